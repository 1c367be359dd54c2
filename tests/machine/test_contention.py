"""Which moments count on a machine whose cores others share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeopt.errors import MeasureError
from edgeopt.machine import contention as paces
from edgeopt.machine.contention import ContentionProbe, select_undisturbed, time_decode_rounds, time_tokens
from edgeopt.measure.probes import latency
from edgeopt.measure.probes.latency import Latency
from edgeopt.measure.stats.aggregate import judge_run, summarize_runs


def machine(folder: Path, flags: str) -> Path:
    (folder / "proc").mkdir()
    (folder / "proc/cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    return folder


@pytest.fixture
def virtual(tmp_path: Path) -> Path:
    return machine(tmp_path, "hypervisor avx2")


def at(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """The bit of work takes these times, one after another, and then the last for ever."""
    left = list(seconds)
    monkeypatch.setattr(paces, "_seconds", lambda: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(paces.os, "sched_getaffinity", lambda _: {0})


class Counting:
    """A session that knows a number of tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def generate(self, tokens: list[int], count: int, *, stop_at_end: bool = True) -> Iterator[int]:
        yield from range(min(count, self.tokens))


def test_on_a_machine_of_its_own_every_moment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 1.0, 2.0)
    pace = ContentionProbe(machine(tmp_path, "avx2"))
    assert [pace.now(), pace.now()] == [0.0, 0.0]
    assert select_undisturbed([1.0, 2.0], [0.0, 0.0], pace.best_s) == [1.0, 2.0]


def test_what_a_neighbour_slowed_down_does_not_count(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 1.6, 1.0, 1.1)
    pace = ContentionProbe(virtual)
    seen = [pace.now() for _ in range(3)]
    assert pace.best_s == 1.0
    assert select_undisturbed(["slow", "best", "near"], seen, pace.best_s) == ["best", "near"]


def test_the_slowest_core_decides(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = set(paces.os.sched_getaffinity(0))
    if len(own) < 2:
        pytest.skip("one core alone")
    by_core = {core: 1.0 + core for core in own}
    monkeypatch.setattr(paces, "_seconds_on", by_core.__getitem__)
    assert ContentionProbe(virtual).now() == 1.0 + max(own)
    assert paces.os.sched_getaffinity(0) == own


def test_work_is_tried_again_until_nobody_slows_it_down(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 1.0, 1.6, 1.6, 1.0, 1.0, 1.0)
    tries = iter("abc")
    assert ContentionProbe(virtual).retry(lambda: next(tries)) == "c"


def test_where_somebody_always_does_the_best_try_counts(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 1.0, 1.9, 1.8, 1.7, 1.6, 1.3, 1.2, 1.2, 1.6, 1.9)
    tries = iter(range(paces.PATIENCE))
    assert ContentionProbe(virtual).retry(lambda: next(tries)) == 3


def test_decoding_goes_on_until_enough_tokens_count(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, *(1.0, 1.6) * 3, 1.0)
    pace = ContentionProbe(virtual)
    found = time_decode_rounds(Counting(99), [1], 4, pace, rounds=2, most_s=10.0)
    assert len(found) == 5, "three that were slowed down, and two"
    assert sum(len(select_undisturbed(*one, pace.best_s)) for one in found) == 8


def test_decoding_ends_where_no_moment_is_undisturbed(virtual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 1.0, 1.6)
    assert len(time_decode_rounds(Counting(99), [1], 4, ContentionProbe(virtual), rounds=2, most_s=0.0)) == 2


def test_an_engine_that_stops_early_is_an_error(virtual: Path) -> None:
    with pytest.raises(MeasureError, match="generated 3 of 5 tokens"):
        time_tokens(Counting(3), [1], 4, ContentionProbe(virtual))


def samples(*rounds: tuple[float, float]) -> dict[str, object]:
    """What a process reports whose rounds of three tokens took so long each, at such a pace."""
    return {
        "cold_start_s": 1.0,
        "load_s": 1.0,
        "ttft_s": {"16": [1.0]},
        "decode_prompt_tokens": 16,
        "decode_s": [[token_s] * 3 for token_s, _ in rounds],
        "decode_pace_s": [[pace_s] * 3 for _, pace_s in rounds],
        "burst_s": 1.0,
        "halves": [],
    }


def decode(*runs: dict[str, object]) -> tuple[float, str]:
    figures = {m.metric: m for m in Latency().summarize(runs)}
    found = figures["latency/decode_p50_ms"]
    return found.value, found.method


def test_the_figure_is_of_tokens_at_the_best_pace_of_all_processes() -> None:
    value, method = decode(samples((0.2, 1.6), (0.1, 1.0)), samples((0.2, 1.6), (0.2, 1.6)))
    assert value == pytest.approx(100)
    assert "excluding 75% slowed down by contention" in method


def test_where_no_process_had_its_cores_for_a_round_all_tokens_count() -> None:
    torn = samples((0.2, 1.6)) | {"decode_pace_s": [[1.0, 1.6, 1.6]]}
    value, method = decode(torn)
    assert value == pytest.approx(200)
    assert "including 67% slowed down by contention" in method


def test_figures_of_work_that_others_slowed_down_are_noisy_once_the_bench_has_judged_it() -> None:
    for slowed, noisy in ((0.0, False), (0.7, True)):
        section = {"elapsed_s": 1.0, "foreign_cpu_share": 0.0}
        report = {
            "sections": {"start": section, "latency": section},
            "samples": {"latency": samples((0.2, 1.0)) | {"slowed": slowed}},
        }
        run = judge_run(
            "generation", report, ["latency"], foreign_cpu_share=0.05, halves_tolerance=0.25, slowed_share=0.5
        )
        figures = summarize_runs("latency", Latency(processes=1), [run], foreign_cpu_share=0.05)
        assert {figure.noisy for figure in figures} == {noisy}


def test_without_neighbours_the_method_says_nothing_of_them() -> None:
    value, method = decode(samples((0.1, 0.0), (0.3, 0.0)))
    assert value == pytest.approx(200)
    assert "contention" not in method


class ProbeContext:
    """What the probe of latency asks of an open engine."""

    def __init__(self) -> None:
        self.session = Counting(99)
        self.marks = {name: {"time_s": 0.0} for name in ("spawned", "imported", "loaded", "first_token")}
        self.prompts = {16: [1]}
        self.context_length = 99


@pytest.mark.parametrize(("most", "slowed"), [(1.0, 0.0), (1.6, 1.0)])
def test_the_probe_reports_how_much_of_what_it_wanted_others_slowed_down(
    most: float, slowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, 1.0, most)
    monkeypatch.setattr(paces, "is_virtual", lambda root: True)
    monkeypatch.setattr(latency, "_MAX_DECODE_S", 0.0)
    assert Latency().collect(ProbeContext())["slowed"] == slowed
