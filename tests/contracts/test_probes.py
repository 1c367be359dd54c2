"""Contract suite of `Probe`, for every config in conf/probe."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import yaml
from support import toy_bench

from edgeopt.core import units
from edgeopt.core.config_objects import instantiate, resolve, to_config
from edgeopt.core.protocols import FILES_GROUP
from edgeopt.measure.harness import child_process
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.harness.workload import build_workload

CONF = Path(__file__).parents[2] / "conf" / "probe"
CONFIGS = [yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))]
PROBES = [resolve(config["_target_"]) for config in CONFIGS]
REQUIRED_VALUES = {"Tasks": {"path": str(toy_bench.TASKS), "names": ["choose_next", "say_next"]}}
"""Fields without a default, by class."""
UNAVAILABLE = () if toy_bench.LM_EVAL else ("Tasks",)
UNIT_OF_ENDING = {
    "_mib": "MiB",
    "_ms": "ms",
    "_j_per_token": "J",
    "_power_w": "W",
    "/power_w": "W",
    "_tokens_per_s": "tokens/s",
    "/parameters": "count",
    "_faults": "count",
    "_faults_per_token": "count",
    "_kl": "nats",
    "/kl_mean": "nats",
    "/kl_p99": "nats",
    "/kl_worst_decile": "nats",
}
each_probe = pytest.mark.parametrize("probe_class", PROBES, ids=lambda p: p.__name__)


def create(probe_class):
    """Create a probe with default and required values; skip the test if its library is not installed."""
    if probe_class.__name__ in UNAVAILABLE:
        pytest.skip(f"the library of {probe_class.__name__} is not installed")
    target = f"{probe_class.__module__}.{probe_class.__name__}"
    return instantiate({"_target_": target, **REQUIRED_VALUES.get(probe_class.__name__, {})})


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return the samples of all probes, measured first without references and then against the first measurement."""
    folder = tmp_path_factory.mktemp("contract")
    engine = toy_bench.build(folder, FakeRuntime())
    workload = build_workload(
        toy_bench.make_text(),
        engine.directory,
        context_length=128,
        prompt_lengths=(16, 64),
        window_tokens=100,
        max_windows=6,
    )
    (folder / "documents.json").write_text(json.dumps(workload.documents))
    reports = []
    references_to_first = dict.fromkeys(("baseline", "checkpoint"), str(folder / "first"))
    for name, references in (("first", {}), ("second", references_to_first)):
        (folder / name).mkdir()
        job = child_process.Job(
            parent=0,
            runtime=to_config(FakeRuntime(token_s=0.0005)),
            probes={p.__name__: to_config(create(p)) for p in PROBES if p.__name__ not in UNAVAILABLE},
            engine=str(engine.directory),
            cores=[0],
            context_length=128,
            prompts={str(n): ids for n, ids in workload.prompts.items()},
            documents=str(folder / "documents.json"),
            references=references,
            scratch=str(folder / name),
            report="",
        )
        reports.append(child_process.run(job, time.monotonic())["samples"])
    return reports


@each_probe
def test_probe_config_round_trips_through_json(probe_class):
    probe = create(probe_class)
    assert instantiate(json.loads(json.dumps(to_config(probe)))) == probe


@each_probe
def test_probe_declares_group_timing_and_processes(probe_class):
    assert probe_class.GROUP
    assert isinstance(probe_class.TIMING_SENSITIVE, bool)
    assert create(probe_class).processes >= 1


@pytest.mark.parametrize("probe_class", [p for p in PROBES if p.GROUP == FILES_GROUP], ids=lambda p: p.__name__)
def test_file_probe_opens_no_engine(probe_class, tmp_path):
    engine = toy_bench.build(tmp_path, FakeRuntime(crash="error"))
    job = child_process.Job(
        parent=0,
        runtime=to_config(FakeRuntime()),
        probes={"own": to_config(create(probe_class))},
        engine=str(engine.directory),
        cores=[0],
        context_length=128,
        prompts={},
        documents="",
        references={},
        scratch="",
        report="",
    )
    assert create(probe_class).summarize([child_process.collect_from_files(job)["samples"]["own"]])


@each_probe
def test_metric_names_have_group_and_unit(probe_class):
    for metric, unit in probe_class.METRICS.items():
        assert "/" in metric
        units.dimension_of(unit)
        expected = next((u for ending, u in UNIT_OF_ENDING.items() if metric.endswith(ending)), "")
        assert unit == expected, metric


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["_target_"])
def test_config_equals_the_default_values(config):
    probe_class = resolve(config["_target_"])
    assert create(probe_class) == instantiate({**config, **REQUIRED_VALUES.get(probe_class.__name__, {})})


@each_probe
def test_samples_are_plain_json(probe_class, reports):
    create(probe_class)
    for report in reports:
        samples = report[probe_class.__name__]
        assert json.loads(json.dumps(samples, allow_nan=False)) == samples


@each_probe
def test_measurements_are_declared_finite_and_in_interval(probe_class, reports):
    probe = create(probe_class)
    for report in reports:
        for measurement in probe.summarize([report[probe_class.__name__]] * probe.processes):
            assert probe.METRICS[measurement.metric] == measurement.unit
            assert all(math.isfinite(x) for x in (measurement.value, measurement.low, measurement.high))
            assert measurement.low <= measurement.value <= measurement.high
            assert measurement.count >= 1
            assert measurement.method
            assert not measurement.noisy, "only the bench detects disturbances"


@each_probe
def test_probe_reports_measurements_with_references(probe_class, reports):
    assert create(probe_class).summarize([reports[1][probe_class.__name__]])


@pytest.mark.parametrize("probe_class", [p for p in PROBES if p.GROUP == "quality"], ids=lambda p: p.__name__)
def test_quality_probes_report_all_metrics_with_references(probe_class, reports):
    measurements = create(probe_class).summarize([reports[1][probe_class.__name__]])
    assert {measurement.metric for measurement in measurements} == probe_class.METRICS.keys()


def test_probes_share_no_metric():
    metrics = [metric for probe in PROBES for metric in probe.METRICS]
    assert len(metrics) == len(set(metrics))
