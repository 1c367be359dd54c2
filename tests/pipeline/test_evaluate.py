"""Evaluate recipes with fakes: early stops, contents of results, and time saved by the cache."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edgeopt.cache import StageCache
from edgeopt.checkpoints import modeling
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.corpus import Text
from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import CompressionContext, Progress, Session
from edgeopt.core.recipe import Recipe
from edgeopt.core.result import Measurement, TrialResult
from edgeopt.core.target import Device, Limit, Target
from edgeopt.errors import ConfigError, StepError
from edgeopt.pipeline.evaluate import evaluate
from edgeopt.pipeline.job import Job

SIZE, MEMORY, LATENCY, PERPLEXITY_RATIO, POWER = (
    "size/engine_mib",
    "memory/peak_rss_mib",
    "latency/decode_p50_ms",
    "quality/perplexity_ratio",
    "energy/measured/power_w",
)
METRICS = {"size": SIZE, "memory": MEMORY, "latency": LATENCY, "quality": PERPLEXITY_RATIO, "energy": POWER}
GROUPS = {"files": ("size",), "generation": ("memory", "latency"), "quality": ("quality",), "energy": ("energy",)}
UNIT = "MiB"
EVALUATION = Text(name="e", documents=("other words",))


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    path: str

    def locate(self) -> Path:
        return Path(self.path)


@dataclass(frozen=True, kw_only=True)
class CopyStep:
    """Step that copies the checkpoint and adds a file, which changes the digest."""

    log: ClassVar[list[str]] = []
    name: str = "copy"
    fails: bool = False

    def plan(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        self.log.append("compress")
        if self.fails:
            raise StepError("this step always fails")
        modeling.link_checkpoint(checkpoint, directory)
        cached = context.cache.get_or_create("analysis", "once", lambda d: (d / "value").write_text("42") and None)
        shutil.copytree(cached, directory / "artifacts")
        (directory / "name").write_text(self.name)
        return checkpoint.spec


@dataclass(frozen=True, kw_only=True)
class CopyRuntime:
    """Runtime whose engines are copies of the checkpoint. It predicts a size between 8 and 12.

    Attributes:
        session_option: affects the session only, not the files.
        refuses: error message of `check`; empty to accept every model.
        loss: suffix that only engines of compressed models get.
    """

    format: ClassVar[str] = "copy-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ()
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset({"session_option"})
    log: ClassVar[list[str]] = []
    kind: str = "runtime"
    session_option: str = ""
    refuses: str = ""
    fallback: CopyRuntime | None = None
    loss: str = ""

    @property
    def baseline(self) -> CopyRuntime:
        return replace(self, loss="")

    def check(self, spec: ModelSpec) -> None:
        if self.refuses:
            raise ConfigError(self.refuses, location="runtime", hint="Use another runtime")

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        return (make_measurement(SIZE, 8.0, 10.0, 12.0, kind="predicted"),)

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        self.log.append(f"build {self.kind}{self.loss}")
        modeling.link_checkpoint(checkpoint, directory)

    def lint(self, engine: Engine) -> list[str]:
        return ["slow"]

    def open(self, engine: Engine, *, threads: int) -> Session:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DeviceBoundRuntime(CopyRuntime):
    """Runtime whose engines need a device that this machine may lack."""

    device_name: ClassVar[str] = ""

    def build_device(self) -> str:
        return self.device_name


def make_measurement(metric: str, low: float, value: float, high: float, **values: Any) -> Measurement:
    return Measurement(metric=metric, unit=UNIT, value=value, low=low, high=high, count=1, method="m", **values)


@dataclass(kw_only=True)
class FakeBench:
    """Bench that measures 10 (interval 9 to 11) for every metric and records its calls.

    Attributes:
        noisy: probes whose measurements are noisy.
        fails: probes that fail for every engine but the baseline.
    """

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: GROUPS)
    evaluation: Text = EVALUATION
    noisy: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    log: list[str] = field(default_factory=list)
    references: dict[str, Mapping[str, Path]] = field(default_factory=dict)
    capped: bool = True
    caps: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def uncapped(self) -> FakeBench:
        return replace(self, capped=False)

    def identity(self, probes: Sequence[str]) -> Mapping[str, Any]:
        return {"probes": list(probes), "capped": self.capped}

    def __call__(
        self,
        engine: Engine,
        runtime: Any,
        directory: Path,
        references: Mapping[str, Path],
        progress: Progress,
        probes: Sequence[str] = (),
        *,
        isolated: bool = True,
    ) -> tuple[Measurement, ...]:
        call = f"{'measure' if isolated else 'observe'} {'+'.join(probes)}"
        self.log.append(call)
        self.references[call] = references
        self.caps.setdefault(call, []).append(self.capped)
        if set(probes) & set(self.fails) and references:
            raise StepError("the process died")
        (directory / "scratch").mkdir()
        (directory / "scratch" / "call").write_text(call)
        (directory / "logs").mkdir()
        return tuple(make_measurement(METRICS[p], 9.0, 10.0, 11.0, noisy=p in self.noisy) for p in probes)

    def merge_samples(self, folders: Sequence[Path], directory: Path) -> None:
        (directory / "samples.json").write_text(json.dumps([len(list(f.iterdir())) for f in folders]))
        (directory / "logs").mkdir()


@dataclass(kw_only=True)
class FakePredictor:
    """Predictor that sets the interval of each observed metric to 7 to 13."""

    bench: FakeBench
    covered: bool = True
    metrics: tuple[str, ...] = (PERPLEXITY_RATIO,)

    def covers(self, spec: ModelSpec) -> bool:
        return self.covered

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        assert baseline[PERPLEXITY_RATIO] == 10.0, "the baseline is measured first"
        return tuple(replace(m, low=7.0, high=13.0, kind="predicted") for m in observed)


@dataclass(kw_only=True)
class RecordingLease:
    """Lease that records when it is acquired and released, and in which mode."""

    log: list[str]

    def exclusive(self, progress: Progress) -> AbstractContextManager[None]:
        return self._record("exclusive")

    def shared(self, progress: Progress) -> AbstractContextManager[None]:
        return self._record("shared")

    @contextmanager
    def _record(self, mode: str) -> Iterator[None]:
        self.log.append(f"({mode}")
        yield
        self.log.append(")")


@pytest.fixture
def log() -> list[str]:
    """Return the list of calls that all fakes append to."""
    CopyStep.log.clear()
    CopyRuntime.log.clear()
    return CopyRuntime.log


JobFactory = Callable[..., Job]


@pytest.fixture
def make_job(tiny_model: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> JobFactory:
    monkeypatch.setattr(CopyStep, "log", log)

    def job(*limits: tuple[str, float], steps: tuple[CopyStep, ...] = (CopyStep(),), **values: Any) -> Job:
        bench = values.pop("bench", None) or FakeBench()
        bench.log = log
        source = LocalModel(path=str(tiny_model))
        named = tuple((f"step{n}", step) for n, step in enumerate(steps))
        predictor = FakePredictor(
            bench=FakeBench(groups={"quality": ("quality",)}, log=log), covered=values.pop("covered", True)
        )
        defaults = {
            "recipe": Recipe(model={}, steps=(), runtime={}),
            "source": source,
            "steps": named,
            "runtime": CopyRuntime(),
            "reference": CopyRuntime(kind="torch"),
            "bench": bench,
            "quality_predictor": predictor,
            "lease": RecordingLease(log=log),
            "target": Target(name="toy"),
            "device": Device(name="toy", cpu="c", cores=1, ram_bytes=2**30),
            "limits": tuple(Limit(metric=metric, unit=UNIT, absolute=bound) for metric, bound in limits),
            "calibration": Text(name="t", documents=("words",)),
        }
        return Job(**{**defaults, **values})

    return job


def run_evaluation(job: Job, folder: Path) -> TrialResult:
    """Evaluate the job and check that its result survives a JSON round trip."""
    result = evaluate(job, StageCache(folder / "cache"), lambda line: None)
    restored = TrialResult.from_json(json.loads(json.dumps(result.to_json())))
    assert replace(restored, recipe=result.recipe) == result
    return result


def without_leases(log: list[str]) -> list[str]:
    """Return the recorded calls without those of the lease."""
    return [entry for entry in log if entry[0] not in "()"]


def test_feasible_trial_passes_all_rungs(make_job: JobFactory, log: list[str], tmp_path: Path) -> None:
    result = run_evaluation(make_job((SIZE, 20.0), (PERPLEXITY_RATIO, 20.0), (POWER, 20.0)), tmp_path)
    assert result.failure is None
    assert (result.refused, result.feasible) == ("", True)
    assert {m.metric for m in result.measurements} == set(METRICS.values())
    assert {m.metric for m in result.predictions} == {SIZE, PERPLEXITY_RATIO}
    measured = ["measure size", "measure memory+latency", "measure quality", "measure energy"]
    assert without_leases(log) == [
        "build runtime",
        *measured,
        "compress",
        "build torch",
        "build torch",
        "observe quality",
        "observe quality",
        "build runtime",
        *measured,
    ]


def test_fallback_runtime_builds_and_is_reported(make_job: JobFactory, log: list[str], tmp_path: Path) -> None:
    runtime = CopyRuntime(refuses="too wide", fallback=CopyRuntime(kind="other"))
    result = run_evaluation(make_job((PERPLEXITY_RATIO, 20.0), runtime=runtime), tmp_path)
    assert result.failure is None
    assert result.notes == ("runtime: too wide; using the fallback CopyRuntime", "lint: slow")
    assert "build runtime" not in log
    assert log.count("build other") == 2, "the baseline too"
    assert result.engine is not None
    assert Engine.read(Path(result.engine.directory)).made_by["runtime"]["kind"] == "other"


def test_baseline_runs_on_lossless_runtime(make_job: JobFactory, log: list[str], tmp_path: Path) -> None:
    run_evaluation(make_job((PERPLEXITY_RATIO, 20.0), steps=(), runtime=CopyRuntime(loss=" with loss")), tmp_path)
    assert [entry for entry in log if entry.startswith("build runtime")] == ["build runtime", "build runtime with loss"]


def test_session_options_share_engine_files(make_job: JobFactory, log: list[str], tmp_path: Path) -> None:
    engines = []
    for option in ("fast", "small"):
        result = run_evaluation(make_job(runtime=CopyRuntime(session_option=option)), tmp_path)
        assert result.engine is not None
        engines.append(Engine.read(Path(result.engine.directory)))
    assert log.count("build runtime") == 2, "the baseline and the recipe"
    assert log.count("measure size") == 4
    assert engines[0].digest == engines[1].digest
    assert [engine.made_by["runtime"]["session_option"] for engine in engines] == ["fast", "small"]


def test_missing_device_yields_build_plan_only(
    make_job: JobFactory, log: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_evaluation(make_job(runtime=DeviceBoundRuntime()), tmp_path)
    assert result.failure is not None
    assert (result.failure.stage, result.failure.kind) == ("build", "BuildError")
    assert "edgeopt build-plan" in result.failure.message
    assert result.engine is not None
    assert without_leases(log) == ["compress", "build runtime"]
    monkeypatch.setattr(DeviceBoundRuntime, "device_name", "a GPU")
    assert run_evaluation(make_job(runtime=DeviceBoundRuntime()), tmp_path).failure is None
    assert log.count("build runtime") == 3, "a build plan does not count as a cached engine"


def test_unsupported_model_fails_with_all_reasons(make_job: JobFactory, tmp_path: Path) -> None:
    runtime = CopyRuntime(refuses="too wide", fallback=CopyRuntime(refuses="too deep"))
    result = run_evaluation(make_job(runtime=runtime), tmp_path)
    assert result.failure is not None
    assert (result.failure.stage, result.failure.kind) == ("plan", "ConfigError")
    assert result.failure.message == "runtime: too wide; too deep. Use another model or recipe"


@pytest.mark.parametrize(
    ("limit", "rung", "measured", "engine"),
    [
        ((SIZE, 7.0), "prediction", [], False),
        ((PERPLEXITY_RATIO, 6.0), "divergence", [], False),
        ((SIZE, 8.5), "build", ["size"], True),
        ((LATENCY, 8.5), "generation", ["size", "memory", "latency"], True),
        ((PERPLEXITY_RATIO, 8.5), "quality", ["size", "memory", "latency", "quality"], True),
        ((POWER, 8.5), "", ["size", "memory", "latency", "quality", "energy"], True),
    ],
)
def test_evaluation_stops_at_first_certain_violation(
    limit: tuple[str, float], rung: str, measured: list[str], engine: bool, make_job: JobFactory, tmp_path: Path
) -> None:
    result = run_evaluation(make_job(limit, (MEMORY, 20.0)), tmp_path)
    assert result.failure is None
    assert result.refused == rung
    assert [m.metric for m in result.measurements] == [METRICS[probe] for probe in measured]
    assert (result.engine is not None) == engine
    assert ("samples.json" in result.artifacts) == bool(measured)
    broken, other = result.verdicts
    assert (broken.metric, broken.satisfied) == (limit[0], False)
    assert broken.predicted == (rung in ("prediction", "divergence"))
    assert other.satisfied == ("memory" in measured)
    assert (other.excess is None) == ("memory" not in measured)
    assert not result.feasible
    assert [v.metric for v in result.violated] == [limit[0]]


def test_limit_inside_interval_does_not_stop(make_job: JobFactory, tmp_path: Path) -> None:
    result = run_evaluation(make_job((SIZE, 10.5), (PERPLEXITY_RATIO, 9.0)), tmp_path)
    assert (result.refused, result.feasible) == ("", False)
    assert len(result.measurements) == len(METRICS)


def test_noisy_measurement_does_not_stop(make_job: JobFactory, tmp_path: Path) -> None:
    result = run_evaluation(make_job((LATENCY, 1.0), bench=FakeBench(noisy=("latency",))), tmp_path)
    assert result.refused == ""
    assert len(result.measurements) == len(METRICS)


def test_disabled_early_stop_measures_everything(make_job: JobFactory, tmp_path: Path) -> None:
    result = run_evaluation(make_job((SIZE, 1.0), (PERPLEXITY_RATIO, 1.0), stop_early=False), tmp_path)
    assert result.refused == ""
    assert len(result.measurements) == len(METRICS)
    assert {m.metric for m in result.predictions} == {SIZE, PERPLEXITY_RATIO}, (
        "predictions can be compared with measurements"
    )
    assert [v.predicted for v in result.verdicts] == [False, False]


@pytest.mark.parametrize(
    "values",
    [
        {"limits": (Limit(metric=SIZE, unit=UNIT, absolute=20.0),)},
        {"covered": False},
        {"quality_predictor": None},
        {"steps": ()},
    ],
    ids=["no quality limit", "model not covered", "no predictor", "uncompressed"],
)
def test_checkpoint_is_observed_only_for_predictable_limits(
    values: dict[str, Any], make_job: JobFactory, log: list[str], tmp_path: Path
) -> None:
    result = run_evaluation(make_job((PERPLEXITY_RATIO, 20.0), **values), tmp_path)
    assert result.failure is None
    assert not [entry for entry in log if entry.startswith("observe")]
    assert "divergence" not in result.timings_s


def test_each_group_references_its_baseline_folder(make_job: JobFactory, tmp_path: Path) -> None:
    bench = FakeBench()
    run_evaluation(make_job((PERPLEXITY_RATIO, 20.0), bench=bench), tmp_path)
    for group, probes in GROUPS.items():
        call = f"measure {'+'.join(probes)}"
        assert (bench.references[call]["baseline"] / "call").read_text() == call, group


def test_memory_cap_applies_to_engine_not_baseline(make_job: JobFactory, tmp_path: Path) -> None:
    bench = FakeBench(groups={"generation": ("memory",)})
    run_evaluation(make_job(bench=bench), tmp_path)
    assert bench.caps == {"measure memory": [False, True]}


def test_later_evaluation_reuses_completed_rungs(make_job: JobFactory, log: list[str], tmp_path: Path) -> None:
    stopped = run_evaluation(make_job((LATENCY, 8.5)), tmp_path)
    assert stopped.refused == "generation"
    log.clear()
    result = run_evaluation(make_job((LATENCY, 20.0)), tmp_path)
    assert without_leases(log) == ["measure quality", "measure energy"]
    assert result.feasible
    computed = {"measure/quality", "measure/energy"}
    assert result.saved_s.keys() == result.timings_s.keys() - computed - {"plan", "wait"}
    assert all(seconds > 0 for seconds in result.saved_s.values())


def test_saved_time_includes_nested_cache_hits(make_job: JobFactory, tmp_path: Path) -> None:
    first = run_evaluation(make_job(), tmp_path)
    assert first.saved_s == {}
    second = run_evaluation(make_job(steps=(CopyStep(name="other"),)), tmp_path)
    assert second.saved_s.keys() == {"fetch", "baseline", "compress/step0/analysis"}


def test_device_is_shared_for_work_exclusive_for_measurements(
    make_job: JobFactory, log: list[str], tmp_path: Path
) -> None:
    run_evaluation(make_job((PERPLEXITY_RATIO, 20.0)), tmp_path)
    mode = ""
    calls = []
    for entry in log:
        if entry[0] in "()":
            mode = entry[1:]
        else:
            calls.append((entry, mode))
    for entry, lease_mode in calls:
        expected = "exclusive" if entry.startswith("measure") else "shared"
        assert lease_mode == ("" if entry == "measure size" else expected), entry
    log.clear()
    run_evaluation(make_job((PERPLEXITY_RATIO, 20.0)), tmp_path)
    assert log == [], "cache hits need no lease"


def test_waiting_is_timed_separately_from_work(
    make_job: JobFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def slow(self: RecordingLease, mode: str) -> Iterator[None]:
        time.sleep(0.1)
        yield

    monkeypatch.setattr(RecordingLease, "_record", slow)
    result = run_evaluation(make_job(), tmp_path)
    assert result.timings_s["wait"] >= 0.1 * 9
    assert result.timings_s["compress/step0"] < 0.1
    assert run_evaluation(make_job(), tmp_path).saved_s["compress/step0"] < 0.1


def test_failure_keeps_stage_and_earlier_measurements(make_job: JobFactory, tmp_path: Path) -> None:
    result = run_evaluation(make_job((MEMORY, 20.0), (POWER, 20.0), bench=FakeBench(fails=("quality",))), tmp_path)
    assert result.failure is not None
    assert (result.failure.stage, result.failure.message) == ("measure/quality", "the process died")
    assert [v.satisfied for v in result.verdicts] == [True, False]
    assert [m.metric for m in result.measurements] == [SIZE, MEMORY, LATENCY]
    assert {"samples.json", "logs"} <= result.artifacts.keys()
    early = run_evaluation(make_job(steps=(CopyStep(fails=True),)), tmp_path)
    assert early.failure is not None
    assert early.failure.stage == "compress/step0"


def test_result_without_saved_time_is_read(make_job: JobFactory, tmp_path: Path) -> None:
    data = run_evaluation(make_job((SIZE, 20.0)), tmp_path).to_json()
    del data["saved_s"]
    assert TrialResult.from_json(data).saved_s == {}
