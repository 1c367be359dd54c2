"""recipe → compress → build → measure → judge: one recipe becomes one TrialResult.

The line is climbed in rungs, from what costs nothing to what costs most, and left at the first after which even the
best that intervals allow for breaks a limit:

    estimate      by arithmetic, before any work; limits that refer to the baseline once that was measured
    divergence    what the compressed checkpoint predicts in torch, before an engine is built of it
    build         the engine's files
    generation, quality, energy, …    each group of probes, in the order of the bench
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeopt.cache import StageCache
from edgeopt.checkpoints import importing
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.config_objects import to_config
from edgeopt.core.judge import judge
from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import FILES_GROUP, DeviceBound, ModelSource, Progress, Runtime, Step
from edgeopt.core.recipe import Recipe
from edgeopt.core.result import PREDICTION, Failure, Measurement, TrialResult
from edgeopt.errors import BuildError, ConfigError, EdgeoptError
from edgeopt.pipeline.early_stop import early_stop_verdicts
from edgeopt.pipeline.job import Job
from edgeopt.pipeline.stages import Work

PARITY_TOLERANCE = 1e-3
"""Largest logit error of an unquantized engine against torch, relative to the largest logit."""


def evaluate(job: Job, store: StageCache, progress: Progress, *, build_only: bool = False) -> TrialResult:
    """Climb the line for one recipe. A failure is part of the result, with its stage and cause.

    With `build_only` nothing is measured, neither the engine nor the baseline, and only what arithmetic refuses is
    refused: the engine lies in the store for whoever measures it, on the device.

    What the result names lies in the store, which may evict it after this unless the caller is holding it.
    """
    with store.protect(progress):
        return _evaluate(job, store, progress, build_only=build_only)


def _evaluate(job: Job, store: StageCache, progress: Progress, *, build_only: bool) -> TrialResult:
    work = Work(store, progress, job.lease)
    climb = _Climb(job, work)
    try:
        try:
            for rung in climb.rungs(build_only=build_only):
                if job.stop_early and (broken := early_stop_verdicts(climb.figures, job.limits, climb.baseline)):
                    climb.result = replace(climb.result, verdicts=broken, refused=rung)
                    break
        finally:
            climb.keep_samples()
    except Exception as error:  # whatever went wrong is the trial's outcome, told with its stage and cause
        progress(traceback.format_exc() if not isinstance(error, EdgeoptError) else str(error))
        failure = Failure(stage=work.now, kind=type(error).__name__, message=str(error))
        climb.result = replace(climb.result, failure=failure)
    return replace(climb.result, timings_s=work.timings_s, saved_s=work.saved_s, artifacts=work.kept)


class _Climb:
    """What is known of one trial on its way up.

    Attributes:
        baseline: the uncompressed model's figures by metric, once they were measured.
    """

    def __init__(self, job: Job, work: Work) -> None:
        self.job, self.work = job, work
        self.baseline: Mapping[str, float] = {}
        self._folders: list[Path] = []
        self.result = TrialResult(
            recipe=job.recipe.summary(),
            target=job.target.name,
            device=to_config(job.device),
            emulated=job.target.is_emulated_by(job.device),
            texts={"calibration": job.calibration.summary(), "evaluation": job.bench.evaluation.summary()},
        )

    @property
    def figures(self) -> tuple[Measurement, ...]:
        """What was predicted, then what was measured."""
        return (*self.result.predictions, *self.result.measurements)

    def rungs(self, *, build_only: bool) -> Iterator[str]:
        """Do the work of one rung after another; say the name of each that more would follow."""
        job, work = self.job, self.work
        with work.at("fetch"):
            original = work.fetch(job.source)
        with work.at("plan"):
            planned = plan(job.steps, job.runtime, original.spec)
            self.job = job = replace(job, runtime=planned.runtime)
            self.result = replace(self.result, notes=planned.notes)
            carried = importing.carried_bytes(original.directory)
            self._foresee(job.runtime.predict(planned.spec, job.target, carried_bytes=carried))
        yield PREDICTION
        if build_only or is_device_missing(job.runtime):
            engine = self._build(self._compress(original))
            if not build_only:
                raise BuildError(
                    "its device is not here, so that there is a plan of it alone",
                    location=str(engine.directory),
                    hint=f"Build and measure it there: edgeopt build-plan {engine.directory}",
                )
            return
        with work.at("baseline"):
            self.baseline, base_folders = work.baseline(job, original)
            self.result = replace(self.result, baseline=self.baseline)
        yield PREDICTION
        checkpoint = self._compress(original)
        if (
            job.quality_predictor is not None
            and checkpoint.digest != original.digest
            and self._is_foreseeable(checkpoint.spec)
        ):
            with work.at("divergence"):
                observed = work.observe(job, job.quality_predictor.bench, checkpoint, original)
                self._foresee(job.quality_predictor.predict(observed, self.baseline))
            yield "divergence"
        engine = self._build(checkpoint)
        groups = tuple(job.bench.groups)
        for group in groups:
            with work.at(f"measure/{group}"):
                self._measure(engine, checkpoint, group, base_folders)
            if group != groups[-1]:
                yield "build" if group == FILES_GROUP else group
        self.result = replace(self.result, verdicts=judge(self.result.measurements, job.limits, self.baseline))

    def keep_samples(self) -> None:
        """Keep what the processes reported that measured the engine so far."""
        if self._folders:
            self.work.gather(self.job.bench, self._folders)

    def _compress(self, original: Checkpoint) -> Checkpoint:
        checkpoint = float_checkpoint = original
        for name, step in self.job.steps:
            with self.work.at(f"compress/{name}"):
                checkpoint = self.work.compress(step, checkpoint, original, float_checkpoint, self.job.calibration)
                float_checkpoint = checkpoint if checkpoint.spec == checkpoint.spec.in_fp32 else float_checkpoint
                self.work.keep(f"steps/{name}", checkpoint.directory / "artifacts")
        return checkpoint

    def _build(self, checkpoint: Checkpoint) -> Engine:
        with self.work.at("build"):
            engine = self.work.build(self.job.runtime, checkpoint, self.job.recipe)
        self.result = replace(
            self.result,
            engine=engine.summary(),
            notes=(*self.result.notes, *(f"lint: {finding}" for finding in self.job.runtime.lint(engine))),
        )
        return engine

    def _is_foreseeable(self, spec: ModelSpec) -> bool:
        """Whether a limit is set on what could be predicted of such a model."""
        quality_predictor = self.job.quality_predictor
        asked = {limit.metric for limit in self.job.limits}
        return (
            quality_predictor is not None
            and not asked.isdisjoint(quality_predictor.metrics)
            and quality_predictor.covers(spec)
        )

    def _foresee(self, predictions: Sequence[Measurement]) -> None:
        self.result = replace(self.result, predictions=(*self.result.predictions, *predictions))

    def _measure(self, engine: Engine, checkpoint: Checkpoint, group: str, baseline: Mapping[str, Path]) -> None:
        found, folder = self.work.measure(self.job, engine, checkpoint, group, baseline)
        self._folders.append(folder)
        measurements = (*self.result.measurements, *found)
        verdicts = judge(measurements, self.job.limits, self.baseline)  # so far, should what follows fail
        self.result = replace(self.result, measurements=measurements, verdicts=verdicts)
        require_parity(found, checkpoint.spec)


def check(job: Job, store: StageCache) -> ModelSpec:
    """The spec that the recipe leads to; raises what is wrong with model, order or values before any work."""
    with store.protect():
        original = Work(store, lambda _: None).fetch(job.source)
    return plan(job.steps, job.runtime, original.spec).spec


def build_engine(source: ModelSource, runtime: Runtime, store: StageCache, progress: Progress) -> Engine:
    """The engine of a model as it is, which the caller's `store.holding` keeps."""
    with store.protect(progress):
        work = Work(store, progress)
        model = work.fetch(source)
        return work.build(runtime, model, Recipe(model=to_config(source), steps=(), runtime=to_config(runtime)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a recipe leads to, by arithmetic.

    Attributes:
        specs: the model before all steps and after each.
        runtime: takes the model before and after them.
        notes: why it is not the one that was asked for, where it is another.
    """

    specs: tuple[ModelSpec, ...]
    runtime: Runtime
    notes: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        """The model after all steps."""
        return self.specs[-1]


def plan(steps: Sequence[tuple[str, Step]], runtime: Runtime, spec: ModelSpec) -> Plan:
    """ConfigError for values, orders and sizes that cannot be, and for models that no runtime takes."""
    specs = [spec]
    for name, step in steps:
        try:
            specs.append(step.plan(specs[-1]))
        except EdgeoptError as error:
            raise (error if error.location == "order" else error.at(f"step.{name}")) from error
    chosen, notes = _fitting(runtime, (spec, specs[-1]))
    return Plan(specs=tuple(specs), runtime=chosen, notes=notes)


def _fitting(runtime: Runtime, specs: Sequence[ModelSpec]) -> tuple[Runtime, tuple[str, ...]]:
    """`runtime`, or the one that takes over where it does not take all of `specs`, and why."""
    try:
        for spec in specs:
            runtime.check(spec)
    except ConfigError as refusal:
        if runtime.fallback is None:
            raise
        try:
            chosen, notes = _fitting(runtime.fallback, specs)
        except ConfigError as another:
            if another.message == refusal.message:
                raise
            raise ConfigError(
                f"{refusal.message}; {another.message}", location=refusal.location, hint="Use another model or recipe"
            ) from another
        return chosen, (f"runtime: {refusal.message}; {type(runtime.fallback).__name__} takes its place", *notes)
    return runtime, ()


def is_device_missing(runtime: Runtime) -> bool:
    """Whether the runtime's engines are built on a device that is not here."""
    return isinstance(runtime, DeviceBound) and not runtime.build_device()


def require_parity(measurements: Sequence[Measurement], spec: ModelSpec) -> None:
    """BuildError where an engine that rounds nothing differs from its torch checkpoint."""
    error = next((m.value for m in measurements if m.metric == "quality/parity_error"), 0.0)
    if spec == spec.in_fp32 and error > PARITY_TOLERANCE:
        raise BuildError(
            f"the engine's logits differ from torch by {error:.2g} of the largest logit, above {PARITY_TOLERANCE:g}",
            hint="The runtime computes this architecture wrongly: use another runtime",
        )
