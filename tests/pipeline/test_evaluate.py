"""One recipe climbs the line rung by rung: where it stops, what it leaves behind, and what it never does twice."""

from __future__ import annotations

import json
import shutil
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

SIZE, MEMORY, SPEED, RATIO, POWER = (
    "size/engine_mib",
    "memory/peak_rss_mib",
    "latency/decode_p50_ms",
    "quality/perplexity_ratio",
    "energy/measured/power_w",
)
METRICS = {"size": SIZE, "memory": MEMORY, "latency": SPEED, "quality": RATIO, "energy": POWER}
GROUPS = {"files": ("size",), "generation": ("memory", "latency"), "quality": ("quality",), "energy": ("energy",)}
UNIT = "MiB"
EVALUATION = Text(name="e", documents=("other words",))


@dataclass(frozen=True, kw_only=True)
class Folder:
    path: str

    def locate(self) -> Path:
        return Path(self.path)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A step that changes nothing but a name, so that its checkpoint is another one."""

    log: ClassVar[list[str]] = []
    name: str = "copy"
    fails: bool = False

    def plan(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        self.log.append("compress")
        if self.fails:
            raise StepError("it cannot be")
        modeling.link(checkpoint, directory)
        shared = context.cache.get_or_create("found_out", "once", lambda d: (d / "fact").write_text("42") and None)
        shutil.copytree(shared, directory / "artifacts")
        (directory / "name").write_text(self.name)
        return checkpoint.spec


@dataclass(frozen=True, kw_only=True)
class Copier:
    """A runtime whose engines are copies, and that predicts a size of 8 to 12."""

    format: ClassVar[str] = "copy-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ()
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset({"opened"})
    log: ClassVar[list[str]] = []
    kind: str = "runtime"
    opened: str = ""
    refuses: str = ""
    fallback: Copier | None = None
    loses: str = ""

    @property
    def baseline(self) -> Copier:
        return replace(self, loses="")

    def check(self, spec: ModelSpec) -> None:
        if self.refuses:
            raise ConfigError(self.refuses, location="runtime", hint="Ask another")

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        return (figure(SIZE, 8.0, 10.0, 12.0, kind="predicted"),)

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        self.log.append(f"build {self.kind}{self.loses}")
        modeling.link(checkpoint, directory)

    def lint(self, engine: Engine) -> list[str]:
        return ["slow"]

    def open(self, engine: Engine, *, threads: int) -> Session:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Copier):
    """One whose engines are built on a device that may not be here."""

    here: ClassVar[str] = ""

    def build_device(self) -> str:
        return self.here


def figure(metric: str, low: float, value: float, high: float, **values: Any) -> Measurement:
    return Measurement(metric=metric, unit=UNIT, value=value, low=low, high=high, count=1, method="m", **values)


@dataclass(kw_only=True)
class Bench:
    """Gives every engine the figures 9 to 11, some noisy, or fails; tells what it was asked."""

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: GROUPS)
    evaluation: Text = EVALUATION
    noisy: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    log: list[str] = field(default_factory=list)
    references: dict[str, Mapping[str, Path]] = field(default_factory=dict)
    capped: bool = True
    caps: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def uncapped(self) -> Bench:
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
        fresh: bool = True,
    ) -> tuple[Measurement, ...]:
        what = f"{'measure' if fresh else 'observe'} {'+'.join(probes)}"
        self.log.append(what)
        self.references[what] = references
        self.caps.setdefault(what, []).append(self.capped)
        if set(probes) & set(self.fails) and references:
            raise StepError("no process lives")
        (directory / "scratch").mkdir()
        (directory / "scratch" / "of").write_text(what)
        (directory / "logs").mkdir()
        return tuple(figure(METRICS[p], 9.0, 10.0, 11.0, noisy=p in self.noisy) for p in probes)

    def gather(self, folders: Sequence[Path], directory: Path) -> None:
        (directory / "samples.json").write_text(json.dumps([len(list(f.iterdir())) for f in folders]))
        (directory / "logs").mkdir()


@dataclass(kw_only=True)
class Seer:
    bench: Bench
    covered: bool = True
    metrics: tuple[str, ...] = (RATIO,)

    def covers(self, spec: ModelSpec) -> bool:
        return self.covered

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        assert baseline[RATIO] == 10.0, "the baseline was measured before"
        return tuple(replace(m, low=7.0, high=13.0, kind="predicted") for m in observed)


@dataclass(kw_only=True)
class Lease:
    """Tells when the device is held, and by whom."""

    log: list[str]

    def exclusive(self, progress: Progress) -> AbstractContextManager[None]:
        return self._taken("hold")

    def shared(self, progress: Progress) -> AbstractContextManager[None]:
        return self._taken("work")

    @contextmanager
    def _taken(self, how: str) -> Iterator[None]:
        self.log.append(f"({how}")
        yield
        self.log.append(")")


@pytest.fixture
def log() -> list[str]:
    """What was done, in order."""
    Copy.log.clear()
    Copier.log.clear()
    return Copier.log


Make = Callable[..., Job]


@pytest.fixture
def make(tiny_model: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(Copy, "log", log)

    def job(*limits: tuple[str, float], steps: tuple[Copy, ...] = (Copy(),), **values: Any) -> Job:
        bench = values.pop("bench", None) or Bench()
        bench.log = log
        source = Folder(path=str(tiny_model))
        named = tuple((f"step{n}", step) for n, step in enumerate(steps))
        seer = Seer(bench=Bench(groups={"quality": ("quality",)}, log=log), covered=values.pop("covered", True))
        defaults = {
            "recipe": Recipe(model={}, steps=(), runtime={}),
            "source": source,
            "steps": named,
            "runtime": Copier(),
            "reference": Copier(kind="torch"),
            "bench": bench,
            "quality_predictor": seer,
            "lease": Lease(log=log),
            "target": Target(name="toy"),
            "device": Device(name="toy", cpu="c", cores=1, ram_bytes=2**30),
            "limits": tuple(Limit(metric=metric, unit=UNIT, absolute=bound) for metric, bound in limits),
            "calibration": Text(name="t", documents=("words",)),
        }
        return Job(**{**defaults, **values})

    return job


def climbed(job: Job, folder: Path) -> TrialResult:
    result = evaluate(job, StageCache(folder / "cache"), lambda line: None)
    read = TrialResult.from_json(json.loads(json.dumps(result.to_json())))
    assert replace(read, recipe=result.recipe) == result
    return result


def done(log: list[str]) -> list[str]:
    """What was done, without what was asked of the lease."""
    return [entry for entry in log if entry[0] not in "()"]


def test_a_trial_that_keeps_every_limit_climbs_all_rungs(make: Make, log: list[str], tmp_path: Path) -> None:
    result = climbed(make((SIZE, 20.0), (RATIO, 20.0), (POWER, 20.0)), tmp_path)
    assert result.failure is None
    assert (result.refused, result.feasible) == ("", True)
    assert {m.metric for m in result.measurements} == set(METRICS.values())
    assert {m.metric for m in result.predictions} == {SIZE, RATIO}
    measured = ["measure size", "measure memory+latency", "measure quality", "measure energy"]
    assert done(log) == [
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


def test_what_a_runtime_refuses_is_built_and_measured_by_the_one_that_takes_its_place_and_this_is_told(
    make: Make, log: list[str], tmp_path: Path
) -> None:
    runtime = Copier(refuses="too wide", fallback=Copier(kind="other"))
    result = climbed(make((RATIO, 20.0), runtime=runtime), tmp_path)
    assert result.failure is None
    assert result.notes == ("runtime: too wide; Copier takes its place", "lint: slow")
    assert "build runtime" not in log
    assert log.count("build other") == 2, "the baseline too"
    assert result.engine is not None
    assert Engine.read(Path(result.engine["directory"])).made_by["runtime"]["kind"] == "other"


def test_the_original_is_measured_on_the_runtime_without_what_that_loses_by_itself(
    make: Make, log: list[str], tmp_path: Path
) -> None:
    climbed(make((RATIO, 20.0), steps=(), runtime=Copier(loses=" with loss")), tmp_path)
    assert [entry for entry in log if entry.startswith("build runtime")] == ["build runtime", "build runtime with loss"]


def test_engines_that_are_opened_differently_are_built_once_and_each_names_its_own_way(
    make: Make, log: list[str], tmp_path: Path
) -> None:
    engines = []
    for opened in ("quickly", "sparingly"):
        result = climbed(make(runtime=Copier(opened=opened)), tmp_path)
        assert result.engine is not None
        engines.append(Engine.read(Path(result.engine["directory"])))
    assert log.count("build runtime") == 2, "the baseline and the recipe"
    assert log.count("measure size") == 4
    assert engines[0].digest == engines[1].digest
    assert [engine.made_by["runtime"]["opened"] for engine in engines] == ["quickly", "sparingly"]


def test_an_engine_whose_device_is_not_here_is_built_as_a_plan_and_measured_nowhere(
    make: Make, log: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = climbed(make(runtime=Elsewhere()), tmp_path)
    assert result.failure is not None
    assert (result.failure.stage, result.failure.kind) == ("build", "BuildError")
    assert "edgeopt build-plan" in result.failure.message
    assert result.engine is not None
    assert done(log) == ["compress", "build runtime"]
    monkeypatch.setattr(Elsewhere, "here", "a GPU")
    assert climbed(make(runtime=Elsewhere()), tmp_path).failure is None
    assert log.count("build runtime") == 3, "the plan is no engine"


def test_a_model_that_no_runtime_takes_fails_the_plan_with_the_words_of_each(make: Make, tmp_path: Path) -> None:
    runtime = Copier(refuses="too wide", fallback=Copier(refuses="too deep"))
    result = climbed(make(runtime=runtime), tmp_path)
    assert result.failure is not None
    assert (result.failure.stage, result.failure.kind) == ("plan", "ConfigError")
    assert result.failure.message == "runtime: too wide; too deep. Use another model or recipe"


@pytest.mark.parametrize(
    ("limit", "rung", "measured", "engine"),
    [
        ((SIZE, 7.0), "prediction", [], False),
        ((RATIO, 6.0), "divergence", [], False),
        ((SIZE, 8.5), "build", ["size"], True),
        ((SPEED, 8.5), "generation", ["size", "memory", "latency"], True),
        ((RATIO, 8.5), "quality", ["size", "memory", "latency", "quality"], True),
        ((POWER, 8.5), "", ["size", "memory", "latency", "quality", "energy"], True),
    ],
)
def test_it_stops_at_the_first_rung_that_breaks_a_limit_for_sure(
    limit: tuple[str, float], rung: str, measured: list[str], engine: bool, make: Make, tmp_path: Path
) -> None:
    result = climbed(make(limit, (MEMORY, 20.0)), tmp_path)
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


def test_a_limit_inside_the_interval_stops_nothing(make: Make, tmp_path: Path) -> None:
    result = climbed(make((SIZE, 10.5), (RATIO, 9.0)), tmp_path)
    assert (result.refused, result.feasible) == ("", False)
    assert len(result.measurements) == len(METRICS)


def test_a_noisy_figure_stops_nothing(make: Make, tmp_path: Path) -> None:
    result = climbed(make((SPEED, 1.0), bench=Bench(noisy=("latency",))), tmp_path)
    assert result.refused == ""
    assert len(result.measurements) == len(METRICS)


def test_a_bench_that_does_not_stop_early_measures_everything(make: Make, tmp_path: Path) -> None:
    result = climbed(make((SIZE, 1.0), (RATIO, 1.0), stop_early=False), tmp_path)
    assert result.refused == ""
    assert len(result.measurements) == len(METRICS)
    assert {m.metric for m in result.predictions} == {SIZE, RATIO}, "predictions can be held against what is measured"
    assert [v.predicted for v in result.verdicts] == [False, False]


@pytest.mark.parametrize(
    "values",
    [
        {"limits": (Limit(metric=SIZE, unit=UNIT, absolute=20.0),)},
        {"covered": False},
        {"quality_predictor": None},
        {"steps": ()},
    ],
    ids=["no limit on it", "no such model", "nobody foresees", "nothing compressed"],
)
def test_torch_is_asked_only_where_it_can_foretell_a_limit(
    values: dict[str, Any], make: Make, log: list[str], tmp_path: Path
) -> None:
    result = climbed(make((RATIO, 20.0), **values), tmp_path)
    assert result.failure is None
    assert not [entry for entry in log if entry.startswith("observe")]
    assert "divergence" not in result.timings_s


def test_each_rung_is_measured_against_the_baselines_folder_of_that_rung(make: Make, tmp_path: Path) -> None:
    bench = Bench()
    climbed(make((RATIO, 20.0), bench=bench), tmp_path)
    for group, probes in GROUPS.items():
        what = f"measure {'+'.join(probes)}"
        assert (bench.references[what]["baseline"] / "of").read_text() == what, group


def test_the_targets_memory_cap_holds_the_engine_and_not_the_model_that_it_was_made_of(make, tmp_path):
    bench = Bench(groups={"generation": ("memory",)})
    climbed(make(bench=bench), tmp_path)
    assert bench.caps == {"measure memory": [False, True]}


def test_a_later_attempt_reuses_the_rungs_that_were_climbed(make: Make, log: list[str], tmp_path: Path) -> None:
    stopped = climbed(make((SPEED, 8.5)), tmp_path)
    assert stopped.refused == "generation"
    log.clear()
    result = climbed(make((SPEED, 20.0)), tmp_path)
    assert done(log) == ["measure quality", "measure energy"]
    assert result.feasible
    made_now = {"measure/quality", "measure/energy"}
    assert result.saved_s.keys() == result.timings_s.keys() - made_now - {"plan", "wait"}
    assert all(seconds > 0 for seconds in result.saved_s.values())


def test_a_trial_tells_what_the_cache_saved_it_inside_of_what_it_made(make: Make, tmp_path: Path) -> None:
    first = climbed(make(), tmp_path)
    assert first.saved_s == {}
    second = climbed(make(steps=(Copy(name="other"),)), tmp_path)
    assert second.saved_s.keys() == {"fetch", "baseline", "compress/step0/found_out"}


def test_what_loads_all_cores_shares_the_device_and_a_measurement_has_it_alone(
    make: Make, log: list[str], tmp_path: Path
) -> None:
    climbed(make((RATIO, 20.0)), tmp_path)
    now = ""
    seen = []
    for entry in log:
        if entry[0] in "()":
            now = entry[1:]
        else:
            seen.append((entry, now))
    for entry, held in seen:
        expected = "hold" if entry.startswith("measure") else "work"
        assert held == ("" if entry == "measure size" else expected), entry
    log.clear()
    climbed(make((RATIO, 20.0)), tmp_path)
    assert log == [], "what is in the cache needs no device"


def test_waiting_for_the_device_is_told_apart_from_work(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    @contextmanager
    def slow(self: Lease, how: str) -> Iterator[None]:
        time.sleep(0.1)
        yield

    monkeypatch.setattr(Lease, "_taken", slow)
    result = climbed(make(), tmp_path)
    assert result.timings_s["wait"] >= 0.1 * 9
    assert result.timings_s["compress/step0"] < 0.1
    assert climbed(make(), tmp_path).saved_s["compress/step0"] < 0.1


def test_a_failure_tells_its_stage_and_keeps_what_was_found_before(make: Make, tmp_path: Path) -> None:
    result = climbed(make((MEMORY, 20.0), (POWER, 20.0), bench=Bench(fails=("quality",))), tmp_path)
    assert result.failure is not None
    assert (result.failure.stage, result.failure.message) == ("measure/quality", "no process lives")
    assert [v.satisfied for v in result.verdicts] == [True, False]
    assert [m.metric for m in result.measurements] == [SIZE, MEMORY, SPEED]
    assert {"samples.json", "logs"} <= result.artifacts.keys()
    early = climbed(make(steps=(Copy(fails=True),)), tmp_path)
    assert early.failure is not None
    assert early.failure.stage == "compress/step0"


def test_a_result_from_before_savings_were_known_is_read(make: Make, tmp_path: Path) -> None:
    data = climbed(make((SIZE, 20.0)), tmp_path).to_json()
    del data["saved_s"]
    assert TrialResult.from_json(data).saved_s == {}
