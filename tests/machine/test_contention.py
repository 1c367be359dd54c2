"""Check the detection of disturbed measurements on a virtual machine with shared cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeopt.errors import MeasureError
from edgeopt.machine import contention
from edgeopt.machine.contention import ContentionProbe, select_undisturbed, time_decode_rounds, time_tokens
from edgeopt.measure.probes import latency
from edgeopt.measure.probes.latency import Latency
from edgeopt.measure.stats.aggregate import judge_run, summarize_runs


def create_cpuinfo(folder: Path, flags: str) -> Path:
    (folder / "proc").mkdir()
    (folder / "proc/cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    return folder


@pytest.fixture
def virtual(tmp_path: Path) -> Path:
    return create_cpuinfo(tmp_path, "hypervisor avx2")


def set_probe_times(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Replace the times of the probe workload; the last one repeats."""
    remaining = list(seconds)
    monkeypatch.setattr(contention, "_workload_s", lambda: remaining.pop(0) if len(remaining) > 1 else remaining[0])
    monkeypatch.setattr(contention.os, "sched_getaffinity", lambda _: {0})


class FakeSession:
    """Session that generates at most `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def generate(self, tokens: list[int], count: int, *, stop_at_end: bool = True) -> Iterator[int]:
        yield from range(min(count, self.tokens))


def test_physical_machine_is_always_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_probe_times(monkeypatch, 1.0, 2.0)
    probe = ContentionProbe(create_cpuinfo(tmp_path, "avx2"))
    assert [probe.measure_s(), probe.measure_s()] == [0.0, 0.0]
    assert select_undisturbed([1.0, 2.0], [0.0, 0.0], probe.best_s) == [1.0, 2.0]


def test_disturbed_values_are_excluded(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_probe_times(monkeypatch, 1.6, 1.0, 1.1)
    probe = ContentionProbe(virtual)
    probe_times = [probe.measure_s() for _ in range(3)]
    assert probe.best_s == 1.0
    assert select_undisturbed(["slow", "best", "near"], probe_times, probe.best_s) == ["best", "near"]


def test_probe_measures_slowest_core(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = set(contention.os.sched_getaffinity(0))
    if len(own) < 2:
        pytest.skip("needs two cores")
    by_core = {core: 1.0 + core for core in own}
    monkeypatch.setattr(contention, "_workload_s_on", by_core.__getitem__)
    assert ContentionProbe(virtual).measure_s() == 1.0 + max(own)
    assert contention.os.sched_getaffinity(0) == own


def test_retry_stops_at_first_undisturbed_attempt(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_probe_times(monkeypatch, 1.0, 1.6, 1.6, 1.0, 1.0, 1.0)
    attempts = iter("abc")
    assert ContentionProbe(virtual).retry(lambda: next(attempts)) == "c"


def test_retry_returns_least_disturbed_attempt(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_probe_times(monkeypatch, 1.0, 1.9, 1.8, 1.7, 1.6, 1.3, 1.2, 1.2, 1.6, 1.9)
    attempts = iter(range(contention.MAX_ATTEMPTS))
    assert ContentionProbe(virtual).retry(lambda: next(attempts)) == 3


def test_decoding_continues_until_enough_undisturbed_tokens(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_probe_times(monkeypatch, *(1.0, 1.6) * 3, 1.0)
    probe = ContentionProbe(virtual)
    rounds = time_decode_rounds(FakeSession(99), [1], 4, probe, rounds=2, timeout_s=10.0)
    assert len(rounds) == 5, "three disturbed rounds and two undisturbed ones"
    assert sum(len(select_undisturbed(*times, probe.best_s)) for times in rounds) == 8


def test_decoding_stops_at_timeout(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_probe_times(monkeypatch, 1.0, 1.6)
    assert len(time_decode_rounds(FakeSession(99), [1], 4, ContentionProbe(virtual), rounds=2, timeout_s=0.0)) == 2


def test_early_end_of_generation_is_an_error(virtual: Path) -> None:
    with pytest.raises(MeasureError, match="must generate 5 tokens, got 3"):
        time_tokens(FakeSession(3), [1], 4, ContentionProbe(virtual))


def samples(*rounds: tuple[float, float]) -> dict[str, object]:
    """Return the samples of a process for rounds of three tokens, given (seconds per token, probe seconds)."""
    return {
        "cold_start_s": 1.0,
        "load_s": 1.0,
        "ttft_s": {"16": [1.0]},
        "decode_prompt_tokens": 16,
        "decode_s": [[token_s] * 3 for token_s, _ in rounds],
        "decode_pace_s": [[probe_s] * 3 for _, probe_s in rounds],
        "burst_s": 1.0,
        "halves": [],
    }


def summarize_decode(*runs: dict[str, object]) -> tuple[float, str]:
    """Return the median decode time in ms and its method."""
    measurements = {m.metric: m for m in Latency().summarize(runs)}
    median = measurements["latency/decode_p50_ms"]
    return median.value, median.method


def test_best_probe_time_spans_all_processes() -> None:
    value, method = summarize_decode(samples((0.2, 1.6), (0.1, 1.0)), samples((0.2, 1.6), (0.2, 1.6)))
    assert value == pytest.approx(100)
    assert "excluding 75% slowed down by contention" in method


def test_all_tokens_count_without_undisturbed_round() -> None:
    disturbed = samples((0.2, 1.6)) | {"decode_pace_s": [[1.0, 1.6, 1.6]]}
    value, method = summarize_decode(disturbed)
    assert value == pytest.approx(200)
    assert "including 67% slowed down by contention" in method


def test_disturbed_share_marks_measurements_noisy() -> None:
    for slowed, noisy in ((0.0, False), (0.7, True)):
        section = {"elapsed_s": 1.0, "foreign_cpu_share": 0.0}
        report = {
            "sections": {"start": section, "latency": section},
            "samples": {"latency": samples((0.2, 1.0)) | {"slowed": slowed}},
        }
        run = judge_run(
            "generation", report, ["latency"], foreign_cpu_share=0.05, halves_tolerance=0.25, slowed_share=0.5
        )
        measurements = summarize_runs("latency", Latency(processes=1), [run], foreign_cpu_share=0.05)
        assert {measurement.noisy for measurement in measurements} == {noisy}


def test_method_omits_contention_on_physical_machines() -> None:
    value, method = summarize_decode(samples((0.1, 0.0), (0.3, 0.0)))
    assert value == pytest.approx(200)
    assert "contention" not in method


class FakeContext:
    """Context with the attributes that the latency probe reads."""

    def __init__(self) -> None:
        self.session = FakeSession(99)
        self.marks = {name: {"time_s": 0.0} for name in ("spawned", "imported", "loaded", "first_token")}
        self.prompts = {16: [1]}
        self.context_length = 99


@pytest.mark.parametrize(("last_probe_s", "slowed"), [(1.0, 0.0), (1.6, 1.0)])
def test_latency_probe_reports_disturbed_share(
    last_probe_s: float, slowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_probe_times(monkeypatch, 1.0, last_probe_s)
    monkeypatch.setattr(contention, "is_virtual", lambda root: True)
    monkeypatch.setattr(latency, "_MAX_DECODE_S", 0.0)
    assert Latency().collect(FakeContext())["slowed"] == slowed
