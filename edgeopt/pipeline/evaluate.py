"""Evaluate one recipe: compress, build, measure, judge, and return a TrialResult.

An evaluation proceeds in rungs, from the cheapest to the most expensive. It stops after the first rung at which a limit
is certainly violated, even by the better end of the metric's interval:

    prediction    arithmetic, before any work; repeated for relative limits once the baseline is measured
    divergence    quality of the compressed checkpoint in PyTorch, before an engine is built
    build         size of the engine's files
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
from edgeopt.core.result import PREDICTION, Failure, Measurement, TrialResult, Verdict
from edgeopt.errors import BuildError, ConfigError, EdgeoptError
from edgeopt.pipeline import stages
from edgeopt.pipeline.early_stop import early_stop_verdicts
from edgeopt.pipeline.job import Job, QualityPredictor
from edgeopt.pipeline.stage_runner import StageRunner

PARITY_TOLERANCE = 1e-3
"""Largest logit error of an unquantized engine relative to PyTorch, as a share of the largest logit."""


def evaluate(job: Job, cache: StageCache, progress: Progress, *, build_only: bool = False) -> TrialResult:
    """Evaluate one recipe. A failure is part of the result, with its stage and cause.

    With `build_only`, build the engine but measure neither it nor the baseline; another process measures them on the
    device. Only predictions can then stop the evaluation early.

    Paths in the result refer to the cache, which may evict them afterwards. To use them, call this function inside
    `cache.protect()`.
    """
    with cache.protect(progress):
        return _evaluate(job, cache, progress, build_only=build_only)


def _evaluate(job: Job, cache: StageCache, progress: Progress, *, build_only: bool) -> TrialResult:
    runner = StageRunner(cache, progress, job.lease)
    evaluation = _Evaluation(job, runner)
    try:
        try:
            for rung in evaluation.run_rungs(build_only=build_only):
                if job.stop_early and (verdicts := evaluation.early_stop_verdicts()):
                    evaluation.result = replace(evaluation.result, verdicts=verdicts, refused=rung)
                    break
        finally:
            evaluation.merge_samples()
    except Exception as error:  # any error is the outcome of the trial, recorded with its stage and cause
        progress(traceback.format_exc() if not isinstance(error, EdgeoptError) else str(error))
        failure = Failure(stage=runner.current_stage, kind=type(error).__name__, message=str(error))
        evaluation.result = replace(evaluation.result, failure=failure)
    return replace(evaluation.result, timings_s=runner.timings_s, saved_s=runner.saved_s, artifacts=runner.artifacts)


class _Evaluation:
    """State of one evaluation.

    Attributes:
        result: outcome so far; every rung adds to it.
    """

    def __init__(self, job: Job, runner: StageRunner) -> None:
        self.job, self.runner = job, runner
        self._folders: list[Path] = []
        self.result = TrialResult(
            recipe=job.recipe.summary(),
            target=job.target.name,
            device=to_config(job.device),
            emulated=job.target.is_emulated_by(job.device),
            texts={"calibration": job.calibration.summary(), "evaluation": job.bench.evaluation.summary()},
        )

    def early_stop_verdicts(self) -> tuple[Verdict, ...]:
        """Return the verdicts on all limits if one is certainly violated by the result so far, else ()."""
        measurements = (*self.result.predictions, *self.result.measurements)
        return early_stop_verdicts(measurements, self.job.limits, self.result.baseline)

    def run_rungs(self, *, build_only: bool) -> Iterator[str]:
        """Run one rung after another and yield the name of each, except the last."""
        job, runner = self.job, self.runner
        with runner.timed("fetch"):
            original = stages.fetch(runner, job.source)
        with runner.timed("plan"):
            planned = plan(job.steps, job.runtime, original.spec)
            self.job = job = replace(job, runtime=planned.runtime)
            self.result = replace(self.result, notes=planned.notes)
            copied_bytes = importing.copied_bytes(original.directory)
            self._add_predictions(job.runtime.predict(planned.spec, job.target, copied_bytes=copied_bytes))
        yield PREDICTION
        if build_only or is_device_missing(job.runtime):
            engine = self._build(self._compress(original))
            if not build_only:
                raise BuildError(
                    "this machine lacks the device of the runtime: wrote a build plan instead of an engine",
                    location=str(engine.directory),
                    hint=f"Build and measure the engine on the device with `edgeopt build-plan {engine.directory}`",
                )
            return
        with runner.timed("baseline"):
            baseline, baseline_folders = stages.measure_baseline(runner, job, original)
            self.result = replace(self.result, baseline=baseline)
        yield PREDICTION
        checkpoint = self._compress(original)
        predictor = job.quality_predictor
        if predictor is not None and self._can_predict(predictor, checkpoint, original):
            with runner.timed("divergence"):
                observed = stages.observe(runner, job, predictor.bench, checkpoint, original)
                self._add_predictions(predictor.predict(observed, self.result.baseline))
            yield "divergence"
        engine = self._build(checkpoint)
        groups = tuple(job.bench.groups)
        for group in groups:
            with runner.timed(f"measure/{group}"):
                self._measure_group(engine, checkpoint, group, baseline_folders)
            if group != groups[-1]:
                yield "build" if group == FILES_GROUP else group
        self.result = replace(self.result, verdicts=judge(self.result.measurements, job.limits, self.result.baseline))

    def merge_samples(self) -> None:
        """Keep the raw samples of all probe groups that were measured so far."""
        if self._folders:
            stages.merge_samples(self.runner, self.job.bench, self._folders)

    def _compress(self, original: Checkpoint) -> Checkpoint:
        checkpoint = float_checkpoint = original
        for name, step in self.job.steps:
            with self.runner.timed(f"compress/{name}"):
                checkpoint = stages.compress(
                    self.runner, step, checkpoint, original, float_checkpoint, self.job.calibration
                )
                float_checkpoint = checkpoint if checkpoint.spec == checkpoint.spec.in_fp32 else float_checkpoint
                self.runner.keep_artifact(f"steps/{name}", checkpoint.directory / "artifacts")
        return checkpoint

    def _build(self, checkpoint: Checkpoint) -> Engine:
        with self.runner.timed("build"):
            engine = stages.build(self.runner, self.job.runtime, checkpoint, self.job.recipe)
        self.result = replace(
            self.result,
            engine=engine.summary(),
            notes=(*self.result.notes, *(f"lint: {finding}" for finding in self.job.runtime.lint(engine))),
        )
        return engine

    def _can_predict(self, predictor: QualityPredictor, checkpoint: Checkpoint, original: Checkpoint) -> bool:
        """Return True if the checkpoint is compressed, and the predictor covers it and one of the limited metrics."""
        limited = {limit.metric for limit in self.job.limits}
        return (
            checkpoint.digest != original.digest
            and not limited.isdisjoint(predictor.metrics)
            and predictor.covers(checkpoint.spec)
        )

    def _add_predictions(self, predictions: Sequence[Measurement]) -> None:
        self.result = replace(self.result, predictions=(*self.result.predictions, *predictions))

    def _measure_group(
        self, engine: Engine, checkpoint: Checkpoint, group: str, baseline_folders: Mapping[str, Path]
    ) -> None:
        added, folder = stages.measure_group(self.runner, self.job, engine, checkpoint, group, baseline_folders)
        self._folders.append(folder)
        measurements = (*self.result.measurements, *added)
        # judge after every group, so that the result has verdicts on these measurements if a later group fails
        verdicts = judge(measurements, self.job.limits, self.result.baseline)
        self.result = replace(self.result, measurements=measurements, verdicts=verdicts)
        require_parity(added, checkpoint.spec)


def check_job(job: Job, cache: StageCache) -> None:
    """Fetch the model and plan all steps by arithmetic.

    Raises InputError for an invalid model, and ConfigError for an invalid order or invalid values of steps.
    """
    with cache.protect():
        original = stages.fetch(StageRunner(cache, lambda _: None), job.source)
    plan(job.steps, job.runtime, original.spec)


def build_engine(source: ModelSource, runtime: Runtime, cache: StageCache, progress: Progress) -> Engine:
    """Build the engine of an uncompressed model. To use the engine, call this function inside `cache.protect()`."""
    with cache.protect(progress):
        runner = StageRunner(cache, progress)
        model = stages.fetch(runner, source)
        recipe = Recipe(model=to_config(source), steps=(), runtime=to_config(runtime))
        return stages.build(runner, runtime, model, recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Model specs and runtime of a recipe, determined by arithmetic.

    Attributes:
        specs: model spec before all steps and after each one.
        runtime: requested runtime, or the fallback that supports the model before and after all steps.
        notes: reasons for using a fallback.
    """

    specs: tuple[ModelSpec, ...]
    runtime: Runtime
    notes: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        """Return the model spec after all steps."""
        return self.specs[-1]


def plan(steps: Sequence[tuple[str, Step]], runtime: Runtime, spec: ModelSpec) -> Plan:
    """Return the plan of a recipe.

    Raises ConfigError for invalid orders or values of steps, and for models that no runtime supports.
    """
    specs = [spec]
    for name, step in steps:
        try:
            specs.append(step.plan(specs[-1]))
        except EdgeoptError as error:
            raise (error if error.location == "order" else error.at(f"step.{name}")) from error
    chosen, notes = _choose_runtime(runtime, (spec, specs[-1]))
    return Plan(specs=tuple(specs), runtime=chosen, notes=notes)


def _choose_runtime(runtime: Runtime, specs: Sequence[ModelSpec]) -> tuple[Runtime, tuple[str, ...]]:
    """Return `runtime`, or the first of its fallbacks that supports all `specs`, and the reasons for the fallback."""
    try:
        for spec in specs:
            runtime.check(spec)
    except ConfigError as error:
        if runtime.fallback is None:
            raise
        try:
            chosen, notes = _choose_runtime(runtime.fallback, specs)
        except ConfigError as fallback_error:
            if fallback_error.message == error.message:
                raise
            raise ConfigError(
                f"{error.message}; {fallback_error.message}",
                location=error.location,
                hint="Use another model or recipe",
            ) from fallback_error
        return chosen, (f"runtime: {error.message}; using the fallback {type(runtime.fallback).__name__}", *notes)
    return runtime, ()


def is_device_missing(runtime: Runtime) -> bool:
    """Return True if the runtime builds engines only on their device and this machine lacks the device."""
    return isinstance(runtime, DeviceBound) and not runtime.build_device()


def require_parity(measurements: Sequence[Measurement], spec: ModelSpec) -> None:
    """Raise BuildError if the logits of an unquantized engine differ from PyTorch."""
    error = next((m.value for m in measurements if m.metric == "quality/parity_error"), 0.0)
    if spec == spec.in_fp32 and error > PARITY_TOLERANCE:
        raise BuildError(
            f"engine logits differ from PyTorch by {error:.2g} of the largest logit (limit {PARITY_TOLERANCE:g})",
            hint="This runtime does not support the architecture correctly: use another runtime",
        )
