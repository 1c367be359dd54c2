"""recipe → compress → build → measure → judge: one recipe becomes one TrialResult."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgeopt import intake, units
from edgeopt.artifact import Checkpoint, Engine
from edgeopt.errors import BuildError, EdgeoptError
from edgeopt.judge import judge
from edgeopt.part import describe
from edgeopt.ports import ModelSource, Progress, Runtime, Step, Workshop
from edgeopt.recipe import Recipe
from edgeopt.result import Failure, Measurement, TrialResult, Verdict
from edgeopt.spec import ModelSpec
from edgeopt.store import Store, versions
from edgeopt.target import Device, Limit, Target
from edgeopt.text import Text

PARITY_TOLERANCE = 1e-3
"""Largest logit error of an unquantized engine against torch, relative to the largest logit."""


class Measure(Protocol):
    """How engines are measured: a bench bound to a device, a target and an evaluation text."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain data that determines the figures, for the store."""
        ...

    def __call__(
        self,
        engine: Engine,
        runtime: Runtime,
        directory: Path,
        references: Mapping[str, Path],
        progress: Progress,
        only: Sequence[str] = (),
    ) -> tuple[Measurement, ...]:
        """With `only`, the named probes alone, in this process: they keep a reference for other engines."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that an evaluation is handed.

    Attributes:
        reference: the runtime whose logits every engine is compared with.
        device: the machine that measures; the target may name another, whose limits are then emulated.
        limits: kept or broken by the result; those that refer to the baseline make it be measured too.
    """

    recipe: Recipe
    source: ModelSource
    steps: tuple[tuple[str, Step], ...]
    runtime: Runtime
    reference: Runtime
    measure: Measure
    target: Target
    device: Device
    limits: tuple[Limit, ...]
    calibration: Text


def evaluate(job: Job, store: Store, progress: Progress) -> TrialResult:
    """Run the whole line for one recipe. A failure is part of the result, with its stage and cause.

    What the result names lies in the store, which may evict it after this unless the caller is holding it.
    """
    with store.holding(progress):
        return _evaluate(job, store, progress)


def _evaluate(job: Job, store: Store, progress: Progress) -> TrialResult:
    work = _Work(store, progress)
    recipe = {"text": str(job.recipe), "digest": job.recipe.digest, **asdict(job.recipe)}
    emulated = job.target.device is not None and job.target.device.fingerprint != job.device.fingerprint
    result = TrialResult(recipe=recipe, target=job.target.name, device=describe(job.device), emulated=emulated)
    try:
        with work.stage("fetch"):
            original = work.fetch(job.source)
        with work.stage("plan"):
            planned = plan(job.steps, job.runtime, original.spec)
            predictions = job.runtime.predict(
                planned, job.target, carried_bytes=intake.carried_bytes(original.directory)
            )
        result = replace(result, predictions=predictions)
        broken = refusal(predictions, job.limits, {})
        if not broken:
            with work.stage("baseline"):
                baseline, base_folder = work.baseline(job, original)
            broken = refusal(predictions, job.limits, baseline)
        if broken:
            return replace(result, verdicts=broken, refused="estimate", timings_s=work.timings_s)
        checkpoint = floating = original
        for name, step in job.steps:
            with work.stage(f"compress/{name}"):
                checkpoint = work.compress(step, checkpoint, original, floating, job.calibration)
                floating = checkpoint if checkpoint.spec == checkpoint.spec.in_fp32 else floating
                work.keep(f"steps/{name}", checkpoint.directory / "artifacts")
        with work.stage("build"):
            engine = work.build(job.runtime, checkpoint, job.recipe)
        result = replace(
            result,
            engine={"directory": str(engine.directory), "digest": engine.digest, "size_bytes": engine.size_bytes},
            notes=tuple(f"lint: {finding}" for finding in job.runtime.lint(engine)),
        )
        with work.stage("measure"):
            measurements, folder = work.measure(job, engine, checkpoint, base_folder)
            for name in ("samples.json", "logs"):
                work.keep(name, folder / name)
        result = replace(result, measurements=measurements, verdicts=judge(measurements, job.limits, baseline))
        require_parity(measurements, checkpoint.spec)
    except Exception as error:  # whatever went wrong is the trial's outcome, told with its stage and cause
        progress(traceback.format_exc() if not isinstance(error, EdgeoptError) else str(error))
        result = replace(result, failure=Failure(stage=work.now, kind=type(error).__name__, message=str(error)))
    return replace(result, timings_s=work.timings_s, artifacts=work.kept)


def check(job: Job, store: Store) -> ModelSpec:
    """The spec that the recipe leads to; raises what is wrong with model, order or values before any work."""
    with store.holding():
        original = _Work(store, lambda _: None).fetch(job.source)
    job.runtime.check(original.spec)
    return plan(job.steps, job.runtime, original.spec)


def engine_of(source: ModelSource, runtime: Runtime, store: Store, progress: Progress) -> Engine:
    """The engine of a model as it is, which the caller's `store.holding` keeps."""
    with store.holding(progress):
        work = _Work(store, progress)
        model = work.fetch(source)
        return work.build(runtime, model, Recipe(model=describe(source), steps=(), runtime=describe(runtime)))


def plan(steps: Sequence[tuple[str, Step]], runtime: Runtime, spec: ModelSpec) -> ModelSpec:
    """The spec after all steps, by arithmetic; ConfigError for values, orders and sizes that cannot be."""
    for name, step in steps:
        try:
            spec = step.plan(spec)
        except EdgeoptError as error:
            raise (error if error.place == "order" else error.at(f"step.{name}")) from error
    runtime.check(spec)
    return spec


def refusal(
    predictions: Sequence[Measurement], limits: Sequence[Limit], baseline: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """Verdicts of all limits where one of them is broken even if all is as good as predictions allow; else none."""
    from_below = {limit.metric for limit in limits if limit.least}
    best = {m.metric: m.high if m.metric in from_below else m.low for m in predictions}
    hoped = [replace(m, value=best[m.metric], low=best[m.metric], high=best[m.metric]) for m in predictions]
    verdicts = judge(hoped, limits, baseline)
    if not any(v.excess is not None and v.excess > 0 for v in verdicts):
        return ()
    unit = {m.metric: m.unit for m in predictions}
    return tuple(_predicted(v, unit[v.metric]) if v.metric in unit else v for v in verdicts)


def _predicted(verdict: Verdict, unit: str) -> Verdict:
    if verdict.excess is None or verdict.excess <= 0:
        return replace(verdict, predicted=True)
    value, bound = (units.show(number or 0.0, unit) for number in (verdict.value, verdict.bound))
    return replace(verdict, predicted=True, reason=f"is predicted to be {value} at best, beyond {bound}")


def require_parity(measurements: Sequence[Measurement], spec: ModelSpec) -> None:
    """BuildError where an engine that rounds nothing differs from its torch checkpoint."""
    error = next((m.value for m in measurements if m.metric == "quality/parity_error"), 0.0)
    if spec == spec.in_fp32 and error > PARITY_TOLERANCE:
        raise BuildError(
            f"the engine's logits differ from torch by {error:.2g} of the largest logit, above {PARITY_TOLERANCE:g}",
            mend="The runtime computes this architecture wrongly: use another runtime",
        )


class _Work:
    """The stages of one evaluation, with the time each took and what is kept of them."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self.store, self.progress = store, progress
        self.now = ""
        self.timings_s: dict[str, float] = {}
        self.kept: dict[str, str] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.now = name
        self.progress(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.timings_s[name] = time.monotonic() - started

    def keep(self, name: str, path: Path) -> None:
        if path.exists():
            self.kept[name] = str(path)

    def fetch(self, source: ModelSource) -> Checkpoint:
        folder = source.locate()
        made = self.store.stage("model", intake.fingerprint(folder), lambda d: _discard(intake.take_in(folder, d)))
        return Checkpoint.read(made)

    def compress(
        self, step: Step, checkpoint: Checkpoint, original: Checkpoint, floating: Checkpoint, calibration: Text
    ) -> Checkpoint:
        description = describe(step)
        shop = Workshop(
            original=original,
            floating=floating,
            calibration=calibration,
            cache=self.store,
            progress=self.progress,
        )

        def produce(directory: Path) -> None:
            spec = step.apply(checkpoint, directory, shop)
            made_by = {"step": description, "input": checkpoint.digest, "calibration": calibration.digest}
            Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by=made_by)

        inputs = [checkpoint.digest, intake.identity(step), original.digest, floating.digest, calibration.digest]
        return Checkpoint.read(self.store.stage("checkpoint", inputs, produce))

    def build(self, runtime: Runtime, checkpoint: Checkpoint, recipe: Recipe) -> Engine:
        description = describe(runtime)

        def produce(directory: Path) -> None:
            runtime.build(checkpoint, directory, self.progress)
            made_by = {
                "runtime": description,
                "recipe": {"text": str(recipe), "digest": recipe.digest},
                "checkpoint": checkpoint.digest,
                "versions": versions(),
            }
            Engine.seal(directory, format=runtime.format, spec=checkpoint.spec, made_by=made_by)

        return Engine.read(self.store.stage("engine", [checkpoint.digest, description], produce))

    def baseline(self, job: Job, original: Checkpoint) -> tuple[dict[str, float], Path]:
        """The uncompressed model's figures and the folder of its samples, measured once and kept."""
        engine = self.build(job.runtime, original, job.recipe.baseline)
        measurements, folder = self._measured(job, engine, job.runtime, {"checkpoint": self._reference(job, original)})
        return {m.metric: m.value for m in measurements}, folder

    def measure(
        self, job: Job, engine: Engine, checkpoint: Checkpoint, base_folder: Path
    ) -> tuple[tuple[Measurement, ...], Path]:
        references = {"baseline": base_folder / "scratch", "checkpoint": self._reference(job, checkpoint)}
        return self._measured(job, engine, job.runtime, references)

    def _reference(self, job: Job, checkpoint: Checkpoint) -> Path:
        """Scratch folder of the reference runtime on the float weights of `checkpoint`."""
        floating = replace(checkpoint, spec=checkpoint.spec.in_fp32)
        engine = self.build(job.reference, floating, replace(job.recipe, runtime=describe(job.reference)))
        return self._measured(job, engine, job.reference, {}, only=("parity",))[1] / "scratch"

    def _measured(
        self, job: Job, engine: Engine, runtime: Runtime, references: Mapping[str, Path], only: Sequence[str] = ()
    ) -> tuple[tuple[Measurement, ...], Path]:
        def produce(directory: Path) -> None:
            found = job.measure(engine, runtime, directory, references, self.progress, only)
            (directory / "measurements.json").write_text(json.dumps([asdict(m) for m in found], indent=1) + "\n")

        inputs = [
            engine.digest,
            describe(runtime),
            job.measure.identity,
            sorted(only),
            {name: str(path) for name, path in references.items()},
        ]
        folder = self.store.stage("measurement", inputs, produce, valid=lambda d: not any(m.noisy for m in _figures(d)))
        return _figures(folder), folder


def _figures(folder: Path) -> tuple[Measurement, ...]:
    return tuple(Measurement(**m) for m in json.loads((folder / "measurements.json").read_text()))


def _discard(_: object) -> None:
    return None
