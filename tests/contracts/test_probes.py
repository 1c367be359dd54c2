"""What every probe promises, held against each choice in conf/probe."""

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
from edgeopt.core.protocols import FILES
from edgeopt.measure.harness import child_process
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.harness.workload import build_workload

CONF = Path(__file__).parents[2] / "conf" / "probe"
CONFIGS = [yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))]
PROBES = [resolve(config["_target_"]) for config in CONFIGS]
OPEN = {"Tasks": {"path": str(toy_bench.TASKS), "names": ["choose_next", "say_next"]}}
"""Values that a config leaves to the user."""
ABSENT = () if toy_bench.LM_EVAL else ("Tasks",)
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


def made(probe_class):
    """A probe with its defaults, and with what has none."""
    if probe_class.__name__ in ABSENT:
        pytest.skip(f"the library of {probe_class.__name__} is not installed")
    target = f"{probe_class.__module__}.{probe_class.__name__}"
    return instantiate({"_target_": target, **OPEN.get(probe_class.__name__, {})})


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What all probes collect together: first of the engine that becomes the reference, then against it."""
    folder = tmp_path_factory.mktemp("contract")
    engine = toy_bench.build(folder, FakeRuntime())
    workload = build_workload(
        toy_bench.text(),
        engine.directory,
        context_length=128,
        prompt_lengths=(16, 64),
        window_tokens=100,
        max_windows=6,
    )
    (folder / "documents.json").write_text(json.dumps(workload.documents))
    found = []
    against = dict.fromkeys(("baseline", "checkpoint"), str(folder / "first"))
    for name, references in (("first", {}), ("second", against)):
        (folder / name).mkdir()
        job = child_process.Job(
            parent=0,
            runtime=to_config(FakeRuntime(token_s=0.0005)),
            probes={p.__name__: to_config(made(p)) for p in PROBES if p.__name__ not in ABSENT},
            engine=str(engine.directory),
            cores=[0],
            context_length=128,
            prompts={str(n): ids for n, ids in workload.prompts.items()},
            documents=str(folder / "documents.json"),
            references=references,
            scratch=str(folder / name),
            report="",
        )
        found.append(child_process.run(job, time.monotonic())["samples"])
    return found


@each_probe
def test_a_probe_is_a_part_that_describes_itself(probe_class):
    probe = made(probe_class)
    assert instantiate(json.loads(json.dumps(to_config(probe)))) == probe


@each_probe
def test_a_probe_says_how_it_is_run(probe_class):
    assert probe_class.GROUP
    assert isinstance(probe_class.TIMED, bool)
    assert made(probe_class).processes >= 1


@pytest.mark.parametrize("probe_class", [p for p in PROBES if p.GROUP == FILES], ids=lambda p: p.__name__)
def test_a_probe_of_files_opens_no_engine(probe_class, tmp_path):
    engine = toy_bench.build(tmp_path, FakeRuntime(crash="error"))
    job = child_process.Job(
        parent=0,
        runtime=to_config(FakeRuntime()),
        probes={"own": to_config(made(probe_class))},
        engine=str(engine.directory),
        cores=[0],
        context_length=128,
        prompts={},
        documents="",
        references={},
        scratch="",
        report="",
    )
    assert made(probe_class).summarize([child_process.collect_from_files(job)["samples"]["own"]])


@each_probe
def test_metrics_are_grouped_and_named_with_their_unit(probe_class):
    for metric, unit in probe_class.METRICS.items():
        assert "/" in metric
        units.dimension_of(unit)
        expected = next((u for ending, u in UNIT_OF_ENDING.items() if metric.endswith(ending)), "")
        assert unit == expected, metric


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["_target_"])
def test_a_config_sets_the_probe_up_as_it_is_by_default(config):
    probe_class = resolve(config["_target_"])
    assert made(probe_class) == instantiate({**config, **OPEN.get(probe_class.__name__, {})})


@each_probe
def test_samples_are_plain_json(probe_class, reports):
    made(probe_class)
    for report in reports:
        samples = report[probe_class.__name__]
        assert json.loads(json.dumps(samples, allow_nan=False)) == samples


@each_probe
def test_figures_are_announced_finite_and_within_their_interval(probe_class, reports):
    probe = made(probe_class)
    for report in reports:
        for figure in probe.summarize([report[probe_class.__name__]] * probe.processes):
            assert probe.METRICS[figure.metric] == figure.unit
            assert all(math.isfinite(x) for x in (figure.value, figure.low, figure.high))
            assert figure.low <= figure.value <= figure.high
            assert figure.count >= 1
            assert figure.method
            assert not figure.noisy, "only the bench knows what disturbed a run"


@each_probe
def test_every_probe_reports_something_once_references_exist(probe_class, reports):
    assert made(probe_class).summarize([reports[1][probe_class.__name__]])


@pytest.mark.parametrize("probe_class", [p for p in PROBES if p.GROUP == "quality"], ids=lambda p: p.__name__)
def test_every_figure_of_quality_is_reported_once_references_exist(probe_class, reports):
    figures = made(probe_class).summarize([reports[1][probe_class.__name__]])
    assert {figure.metric for figure in figures} == probe_class.METRICS.keys()


def test_no_two_probes_share_a_metric():
    every = [metric for probe in PROBES for metric in probe.METRICS]
    assert len(every) == len(set(every))
