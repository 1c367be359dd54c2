"""Test measurements of fake engines in real child processes."""

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
from edgeopt.config import parse
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.harness import child_process, samples
from edgeopt.measure.harness.bench import Bench
from edgeopt.measure.harness.fake_runtime import FakeRuntime

ROOT = Path(edgeopt.__file__).parents[1]
HEAVY = {"torch", "numpy", "transformers", "hydra", "mlflow", "onnxruntime", "tokenizers", "importlib.metadata"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the folder and the figures of one measurement with the generation probes."""
    folder = tmp_path_factory.mktemp("bench")
    return folder, toy_bench.build_and_measure(folder, FakeRuntime(), toy_bench.make_bench("size", "memory", "latency"))


def record(folder):
    return json.loads((folder / "measured" / "samples.json").read_text())


def test_figures_have_declared_metric_unit_and_interval(measured):
    known = toy_bench.make_bench("size", "memory", "latency").metrics
    for figure in measured[1].values():
        assert figure.unit == known[figure.metric]
        assert figure.low <= figure.value <= figure.high


def test_each_probe_gets_its_process_count(measured):
    runs = record(measured[0])["runs"]
    counts = {name: sum(name in run["report"]["samples"] for run in runs) for name in ("size", "memory", "latency")}
    assert counts == {"size": 1, "memory": 3, "latency": 5}


def group(folder, name):
    return [run for run in record(folder)["runs"] if run["group"] == name]


def test_memory_collects_before_latency(measured):
    assert list(group(measured[0], "generation")[0]["report"]["sections"]) == ["start", "memory", "latency"]


def test_decode_percentiles_use_at_least_200_tokens(measured):
    assert measured[1]["latency/decode_p99_ms"].count >= 200


def test_size_is_sum_of_files(measured):
    files = [f for f in (measured[0] / "engine").iterdir() if f.name != "edgeopt.json"]
    assert measured[1]["size/engine_mib"].value == sum(f.stat().st_size for f in files) / 2**20
    assert measured[1]["size/parameters"].value == toy_bench.SPEC.parameters


def test_file_probes_run_first_without_process(tmp_path):
    figures = toy_bench.build_and_measure(tmp_path, FakeRuntime(crash="hang"), toy_bench.make_bench("size"))
    assert figures["size/engine_mib"].value > 0
    assert not list((tmp_path / "measured" / "logs").iterdir())
    assert list(toy_bench.make_bench("quality", "latency", "energy", "size").groups) == [
        "files",
        "quality",
        "generation",
        "energy",
    ]


def test_default_groups_are_ordered_by_cost():
    composed = parse.compose()
    groups = parse.instantiate_group(composed, "measure").groups
    assert list(groups) == ["files", "generation", "quality", "energy"]
    assert groups["generation"] == ("memory", "latency")


@dataclass(frozen=True, kw_only=True)
class SessionUsingProbe:
    """A probe of the group `files` that generates."""

    METRICS: ClassVar[dict[str, str]] = {"generating/x": ""}
    GROUP: ClassVar[str] = "files"
    TIMING_SENSITIVE: ClassVar[bool] = False
    processes: int = 1

    def collect(self, context):
        return {"x": list(context.session.generate([1], 1))}

    def summarize(self, runs):
        return []


def test_file_probe_using_session_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(child_process, "instantiate", lambda config, location: SessionUsingProbe())
    with pytest.raises(MeasureError, match="GROUP"):
        toy_bench.build_and_measure(
            tmp_path, FakeRuntime(), toy_bench.make_bench(probes={"generating": SessionUsingProbe()})
        )


def test_merged_records_equal_a_joint_measurement(tmp_path, measured):
    folders = []
    for name, probes in toy_bench.make_bench("size", "memory", "latency").groups.items():
        toy_bench.build_and_measure(tmp_path / name, FakeRuntime(), toy_bench.make_bench(*probes))
        folders.append(tmp_path / name / "measured")
    samples.merge(folders, tmp_path)
    merged, joint = json.loads((tmp_path / "samples.json").read_text()), record(measured[0])
    assert {k: merged[k] for k in merged if k != "runs"} == {k: joint[k] for k in joint if k != "runs"}
    assert [(r["group"], list(r["report"]["samples"])) for r in merged["runs"]] == [
        (r["group"], list(r["report"]["samples"])) for r in joint["runs"]
    ]
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == sorted(
        log.name for log in (measured[0] / "measured" / "logs").iterdir()
    )


def test_memory_figures_are_consistent(measured):
    figures = measured[1]
    assert figures["memory/bare_rss_mib"].value < figures["memory/steady_rss_mib"].value
    assert figures["memory/steady_rss_mib"].value <= figures["memory/peak_rss_mib"].value + 1
    split = figures["memory/private_mib"].value + figures["memory/shared_mib"].value
    assert split == pytest.approx(figures["memory/steady_rss_mib"].value, rel=0.02)


def test_cold_start_includes_load(measured):
    assert measured[1]["latency/cold_start_ms"].value > measured[1]["latency/load_ms"].value > 0


def test_each_process_has_a_log(measured):
    logs = list((measured[0] / "measured" / "logs").iterdir())
    assert sorted(log.name for log in logs) == [
        f"generation-{n}.log" for n in range(len(group(measured[0], "generation")))
    ]


def test_allocated_memory_appears_in_figures(measured, tmp_path):
    heavy = toy_bench.build_and_measure(tmp_path, FakeRuntime(allocate_mib=96), toy_bench.make_bench("memory"))
    for metric in ("memory/peak_rss_mib", "memory/steady_rss_mib", "memory/private_mib"):
        assert heavy[metric].value - measured[1][metric].value >= 95
    assert abs(heavy["memory/bare_rss_mib"].value - measured[1]["memory/bare_rss_mib"].value) < 8


def test_parent_memory_is_not_counted(tmp_path):
    ballast = b"\1" * (256 * 2**20)
    figures = toy_bench.build_and_measure(tmp_path, FakeRuntime(), toy_bench.make_bench("memory"))
    assert figures["memory/peak_rss_mib"].high < len(ballast) / 2**20


def test_engine_time_appears_in_every_latency(tmp_path):
    latency = toy_bench.probe_config(
        "latency", processes=2, decode_tokens=50, ttft_repeats=1, burst_requests=2, burst_tokens=8
    )
    figures = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(token_s=0.005), toy_bench.make_bench(probes={"latency": latency})
    )
    for metric in ("latency/ttft_16_ms", "latency/decode_p50_ms", "latency/decode_p95_ms", "latency/cold_start_ms"):
        assert figures[metric].value >= 5
    assert figures["latency/burst_ms"].value >= 2 * 8 * 5
    assert figures["throughput/decode_tokens_per_s"].value <= 200


def test_prompts_beyond_context_are_skipped(tmp_path):
    target = replace(toy_bench.TARGET, context_length=64)
    figures = toy_bench.build_and_measure(tmp_path, FakeRuntime(), toy_bench.make_bench("latency"), target=target)
    assert {m for m in figures if "ttft" in m} == {"latency/ttft_16_ms"}
    assert record(tmp_path)["prompt_lengths_left_out"] == [64, 256]


def test_disabled_probe_reports_nothing(tmp_path):
    bench = toy_bench.make_bench(probes={"size": toy_bench.probe_config("size"), "latency": None})
    assert set(toy_bench.build_and_measure(tmp_path, FakeRuntime(), bench)) == {"size/engine_mib", "size/parameters"}


@pytest.mark.parametrize(
    ("crash", "message"),
    [
        ("error", "the fake runtime fails on request"),
        ("segfault", "killed by SIGSEGV"),
        ("out_of_memory", "killed by SIGKILL.*memory"),
        ("hang", "must finish within 2 s"),
    ],
)
def test_process_failure_is_explained(tmp_path, crash, message):
    before = psutil.Process().children()
    with pytest.raises(MeasureError, match=message) as caught:
        toy_bench.build_and_measure(tmp_path, FakeRuntime(crash=crash), toy_bench.make_bench("memory", timeout_s=2.0))
    assert str(tmp_path / "measured" / "logs") in str(caught.value)
    assert psutil.Process().children() == before


PARENT = """
import sys
from pathlib import Path
from support import toy_bench
from edgeopt.measure.harness.fake_runtime import FakeRuntime
toy_bench.build_and_measure(Path(sys.argv[1]), FakeRuntime(crash="hang"), toy_bench.make_bench("memory"))
"""


def test_measured_process_dies_with_its_parent(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    children = []
    while not children and parent.poll() is None:
        time.sleep(0.05)
        children = [
            c for c in psutil.Process(parent.pid).children() if "edgeopt.measure.harness.child_process" in c.cmdline()
        ]
    time.sleep(1)  # let it reach the point where it hangs
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive


def spin() -> None:
    while True:
        pass


def test_foreign_load_marks_timed_figures_noisy(tmp_path):
    spawned = multiprocessing.get_context("spawn").Process
    spinners = [spawned(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for spinner in spinners:
        spinner.start()
    try:
        latency = toy_bench.probe_config("latency", processes=2, decode_tokens=50, ttft_repeats=1)
        bench = toy_bench.make_bench(
            probes={"latency": latency, "size": toy_bench.probe_config("size")}, foreign_cpu_share=0.05, retries=1
        )
        figures = toy_bench.build_and_measure(tmp_path, FakeRuntime(), bench)
    finally:
        for spinner in spinners:
            spinner.kill()
    runs = group(tmp_path, "generation")
    assert len(runs) == 3, "two processes, and one retry because they were disturbed"
    assert all("other processes" in run["disturbance"] for run in runs)
    cold_ms = [1e3 * run["report"]["samples"]["latency"]["cold_start_s"] for run in runs]
    cold = figures["latency/cold_start_ms"]
    assert cold.noisy
    assert cold.low <= min(cold_ms)
    assert cold.high >= max(cold_ms)
    assert not figures["size/engine_mib"].noisy


def test_child_process_imports_no_heavy_library():
    code = "import sys, edgeopt.measure.harness.child_process; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(output.split())


def test_missing_reference_is_an_error(tmp_path):
    with pytest.raises(MeasureError, match="reference 'baseline' does not exist"):
        toy_bench.build_and_measure(
            tmp_path, FakeRuntime(), toy_bench.make_bench("size"), references={"baseline": tmp_path / "nowhere"}
        )


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "measured").write_text("a file in place of the folder")
    with pytest.raises(MeasureError, match="cannot write the measurement"):
        toy_bench.build_and_measure(tmp_path, FakeRuntime(), toy_bench.make_bench("size"))


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
        ({"probes": {"fake": {"_target_": "edgeopt.measure.harness.fake_runtime.FakeRuntime"}}}, "measure.probes.fake"),
        ({"probes": {"first": toy_bench.probe_config("size"), "second": toy_bench.probe_config("size")}}, "probes"),
    ],
)
def test_invalid_value_is_rejected_with_its_location(values, location):
    with pytest.raises(ConfigError) as caught:
        Bench(**{"probes": {}, **values})
    assert caught.value.location == location
