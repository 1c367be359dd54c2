"""Measurements of stub engines in real child processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from support import toy_bench

import edgeopt
from edgeopt.config import parse as configs
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.harness import child_process, samples
from edgeopt.measure.harness.bench import Bench
from edgeopt.measure.harness.fake_runtime import FakeRuntime

ROOT = Path(edgeopt.__file__).parents[1]
HEAVY = {"torch", "numpy", "transformers", "hydra", "mlflow", "onnxruntime", "tokenizers", "importlib.metadata"}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder and the figures of one measurement with the probes of the generation group."""
    folder = tmp_path_factory.mktemp("usual")
    return folder, toy_bench.measured(folder, FakeRuntime(), toy_bench.bench("size", "memory", "latency"))


def record(folder):
    return json.loads((folder / "measured" / "samples.json").read_text())


def test_every_figure_has_a_known_metric_a_unit_and_an_interval_around_it(usual):
    known = toy_bench.bench("size", "memory", "latency").metrics
    for figure in usual[1].values():
        assert figure.unit == known[figure.metric]
        assert figure.low <= figure.value <= figure.high


def test_processes_are_as_many_as_each_probe_asks_for(usual):
    runs = record(usual[0])["runs"]
    asked = {name: sum(name in run["report"]["samples"] for run in runs) for name in ("size", "memory", "latency")}
    assert asked == {"size": 1, "memory": 3, "latency": 5}


def group(folder, name):
    return [run for run in record(folder)["runs"] if run["group"] == name]


def test_memory_is_taken_before_other_work_leaves_its_own_in_the_process(usual):
    assert list(group(usual[0], "generation")[0]["report"]["sections"]) == ["start", "memory", "latency"]


def test_at_least_200_tokens_stand_behind_the_decode_percentiles(usual):
    assert usual[1]["latency/decode_p99_ms"].count >= 200


def test_the_size_is_that_of_the_files(usual):
    files = [f for f in (usual[0] / "engine").iterdir() if f.name != "edgeopt.json"]
    assert usual[1]["size/engine_mib"].value == sum(f.stat().st_size for f in files) / 2**20
    assert usual[1]["size/parameters"].value == toy_bench.SPEC.parameters


def test_files_are_looked_at_without_a_process_and_first_of_all(tmp_path):
    figures = toy_bench.measured(tmp_path, FakeRuntime(crash="hang"), toy_bench.bench("size"))
    assert figures["size/engine_mib"].value > 0
    assert not list((tmp_path / "measured" / "logs").iterdir())
    assert list(toy_bench.bench("quality", "latency", "energy", "size").groups) == [
        "files",
        "quality",
        "generation",
        "energy",
    ]


def test_the_groups_of_the_default_bench_come_in_the_order_of_their_cost():
    composed = configs.compose()
    groups = configs.part(composed, "measure").groups
    assert list(groups) == ["files", "generation", "quality", "energy"]
    assert groups["generation"] == ("memory", "latency")


@dataclass(frozen=True, kw_only=True)
class Nosy:
    """A probe that says it looks at files, and generates."""

    METRICS: ClassVar[dict[str, str]] = {"nosy/x": ""}
    GROUP: ClassVar[str] = "files"
    TIMED: ClassVar[bool] = False
    processes: int = 1

    def collect(self, subject):
        return {"x": list(subject.session.generate([1], 1))}

    def summarize(self, runs):
        return []


def test_a_probe_of_files_that_wants_a_session_is_told_to_change_its_group(tmp_path, monkeypatch):
    monkeypatch.setattr(child_process, "instantiate", lambda described, location: Nosy())
    with pytest.raises(MeasureError, match="GROUP"):
        toy_bench.measured(tmp_path, FakeRuntime(), toy_bench.bench(probes={"nosy": Nosy()}))


def test_the_record_of_groups_measured_one_by_one_is_that_of_all_together(tmp_path, usual):
    folders = []
    for name, probes in toy_bench.bench("size", "memory", "latency").groups.items():
        toy_bench.measured(tmp_path / name, FakeRuntime(), toy_bench.bench(*probes))
        folders.append(tmp_path / name / "measured")
    samples.merge(folders, tmp_path)
    found, whole = json.loads((tmp_path / "samples.json").read_text()), record(usual[0])
    assert {k: found[k] for k in found if k != "runs"} == {k: whole[k] for k in whole if k != "runs"}
    assert [(r["group"], list(r["report"]["samples"])) for r in found["runs"]] == [
        (r["group"], list(r["report"]["samples"])) for r in whole["runs"]
    ]
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == sorted(
        log.name for log in (usual[0] / "measured" / "logs").iterdir()
    )


def test_memory_adds_up(usual):
    figures = usual[1]
    assert figures["memory/bare_rss_mib"].value < figures["memory/steady_rss_mib"].value
    assert figures["memory/steady_rss_mib"].value <= figures["memory/peak_rss_mib"].value + 1
    split = figures["memory/private_mib"].value + figures["memory/shared_mib"].value
    assert split == pytest.approx(figures["memory/steady_rss_mib"].value, rel=0.02)


def test_cold_start_holds_load(usual):
    assert usual[1]["latency/cold_start_ms"].value > usual[1]["latency/load_ms"].value > 0


def test_a_log_of_each_process_is_kept(usual):
    logs = list((usual[0] / "measured" / "logs").iterdir())
    assert sorted(log.name for log in logs) == [
        f"generation-{n}.log" for n in range(len(group(usual[0], "generation")))
    ]


def test_memory_that_the_engine_takes_shows_in_the_peak(usual, tmp_path):
    heavy = toy_bench.measured(tmp_path, FakeRuntime(allocate_mib=96), toy_bench.bench("memory"))
    for metric in ("memory/peak_rss_mib", "memory/steady_rss_mib", "memory/private_mib"):
        assert heavy[metric].value - usual[1][metric].value >= 95
    assert abs(heavy["memory/bare_rss_mib"].value - usual[1]["memory/bare_rss_mib"].value) < 8


def test_memory_of_the_parent_does_not_show_in_the_child(tmp_path):
    ballast = b"\1" * (256 * 2**20)
    figures = toy_bench.measured(tmp_path, FakeRuntime(), toy_bench.bench("memory"))
    assert figures["memory/peak_rss_mib"].high < len(ballast) / 2**20


def test_time_that_the_engine_takes_shows_in_every_latency(tmp_path):
    latency = toy_bench.probe_config(
        "latency", processes=2, decode_tokens=50, ttft_repeats=1, burst_requests=2, burst_tokens=8
    )
    figures = toy_bench.measured(tmp_path, FakeRuntime(token_s=0.005), toy_bench.bench(probes={"latency": latency}))
    for metric in ("latency/ttft_16_ms", "latency/decode_p50_ms", "latency/decode_p95_ms", "latency/cold_start_ms"):
        assert figures[metric].value >= 5
    assert figures["latency/burst_ms"].value >= 2 * 8 * 5
    assert figures["throughput/decode_tokens_per_s"].value <= 200


def test_prompts_beyond_the_context_are_not_measured(tmp_path):
    target = replace(toy_bench.TARGET, context_length=64)
    figures = toy_bench.measured(tmp_path, FakeRuntime(), toy_bench.bench("latency"), target=target)
    assert {m for m in figures if "ttft" in m} == {"latency/ttft_16_ms"}
    assert record(tmp_path)["prompt_lengths_left_out"] == [64, 256]


def test_a_probe_that_is_off_reports_nothing(tmp_path):
    bench = toy_bench.bench(probes={"size": toy_bench.probe_config("size"), "latency": None})
    assert set(toy_bench.measured(tmp_path, FakeRuntime(), bench)) == {"size/engine_mib", "size/parameters"}


@pytest.mark.parametrize(
    ("crash", "words"),
    [
        ("error", "the stub was told to fail"),
        ("segfault", "killed by SIGSEGV"),
        ("out_of_memory", "killed by SIGKILL.*memory"),
        ("hang", "longer than 2 s"),
    ],
)
def test_how_the_process_died_is_said(tmp_path, crash, words):
    before = psutil.Process().children()
    with pytest.raises(MeasureError, match=words) as caught:
        toy_bench.measured(tmp_path, FakeRuntime(crash=crash), toy_bench.bench("memory", timeout_s=2.0))
    assert str(tmp_path / "measured" / "logs") in str(caught.value)
    assert psutil.Process().children() == before


PARENT = """
import sys
from pathlib import Path
from support import toy_bench
from edgeopt.measure.harness.fake_runtime import FakeRuntime
toy_bench.measured(Path(sys.argv[1]), FakeRuntime(crash="hang"), toy_bench.bench("memory"))
"""


def test_the_measured_process_dies_with_its_parent(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    children = []
    while not children and parent.poll() is None:
        time.sleep(0.05)
        children = [
            c for c in psutil.Process(parent.pid).children() if "edgeopt.measure.harness.child_process" in c.cmdline()
        ]
    time.sleep(1)  # let it come to where it hangs
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive


def spin() -> None:
    while True:
        pass


def test_foreign_load_makes_timed_figures_noisy_and_their_intervals_hold_every_try(tmp_path):
    spawned = multiprocessing.get_context("spawn").Process
    spinners = [spawned(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for spinner in spinners:
        spinner.start()
    try:
        latency = toy_bench.probe_config("latency", processes=2, decode_tokens=50, ttft_repeats=1)
        bench = toy_bench.bench(
            probes={"latency": latency, "size": toy_bench.probe_config("size")}, foreign_cpu_share=0.05, retries=1
        )
        figures = toy_bench.measured(tmp_path, FakeRuntime(), bench)
    finally:
        for spinner in spinners:
            spinner.kill()
    runs = group(tmp_path, "generation")
    assert len(runs) == 3, "two, and one more because they were disturbed"
    assert all("other processes" in run["disturbance"] for run in runs)
    cold_ms = [1e3 * run["report"]["samples"]["latency"]["cold_start_s"] for run in runs]
    cold = figures["latency/cold_start_ms"]
    assert cold.noisy
    assert cold.low <= min(cold_ms)
    assert cold.high >= max(cold_ms)
    assert not figures["size/engine_mib"].noisy


def test_the_child_starts_without_heavy_libraries():
    code = "import sys, edgeopt.measure.harness.child_process; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(output.split())


def test_a_reference_that_is_absent_is_an_error(tmp_path):
    with pytest.raises(MeasureError, match="'baseline' is absent"):
        toy_bench.measured(
            tmp_path, FakeRuntime(), toy_bench.bench("size"), references={"baseline": tmp_path / "nowhere"}
        )


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "measured").write_text("a file where the folder should be")
    with pytest.raises(MeasureError, match="cannot be kept"):
        toy_bench.measured(tmp_path, FakeRuntime(), toy_bench.bench("size"))


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"prompt_lengths": (17,)}, "prompt_lengths"),
        ({"prompt_lengths": ()}, "prompt_lengths"),
        ({"max_windows": 0}, "max_windows"),
        ({"foreign_cpu_share": float("nan")}, "foreign_cpu_share"),
        ({"retries": -1}, "retries"),
        ({"probes": {"memory": toy_bench.probe_config("memory", processes=0)}}, "measure.probes.memory.processes"),
        (
            {"probes": {"latency": toy_bench.probe_config("latency", decode_tokens=1)}},
            "measure.probes.latency.decode_tokens",
        ),
        ({"probes": {"memory": toy_bench.probe_config("memory", colour="red")}}, "measure.probes.memory.colour"),
        ({"probes": {"stub": {"_target_": "edgeopt.measure.harness.fake_runtime.FakeRuntime"}}}, "measure.probes.stub"),
        ({"probes": {"one": toy_bench.probe_config("size"), "two": toy_bench.probe_config("size")}}, "probes"),
    ],
)
def test_a_wrong_value_is_refused_by_its_place(values, location):
    with pytest.raises(ConfigError) as caught:
        Bench(**{"probes": {}, **values})
    assert caught.value.location == location
