"""Define the input of one evaluation: the objects of a recipe, the bench, the target and its limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeopt.core.artifact import Engine
from edgeopt.core.corpus import Text
from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import Lease, ModelSource, Progress, Runtime, Step
from edgeopt.core.recipe import Recipe
from edgeopt.core.result import Measurement
from edgeopt.core.target import Device, Limit, Target


class EngineBench(Protocol):
    """Probes bound to a device, a target and an evaluation text."""

    @property
    def evaluation(self) -> Text:
        """Return the evaluation text."""
        ...

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return the probe names by group, in the order of measurement."""
        ...

    @property
    def uncapped(self) -> EngineBench:
        """Return this bench without the target's memory cap, for models that need not fit the target."""
        ...

    def identity(self, probes: Sequence[str]) -> Mapping[str, Any]:
        """Return plain data that determines the results of these probes; part of the cache key."""
        ...

    def __call__(
        self,
        engine: Engine,
        runtime: Runtime,
        directory: Path,
        references: Mapping[str, Path],
        progress: Progress,
        probes: Sequence[str] = (),
        *,
        isolated: bool = True,
    ) -> tuple[Measurement, ...]:
        """Run `probes`, or all probes if empty, and return their measurements.

        Args:
            directory: folder for the raw samples, the logs and the scratch folder.
            references: scratch folders of engines to compare with, by role: `baseline`, `checkpoint`.
            isolated: run the probes in fresh processes. Otherwise run them in this process, which suffices for values
                that do not depend on timing.
        """
        ...

    def merge_samples(self, folders: Sequence[Path], directory: Path) -> None:
        """Merge `samples.json`, `tables` and `logs` of the measurement folders of one engine into `directory`."""
        ...


class QualityPredictor(Protocol):
    """Predicts the quality of an engine from its compressed checkpoint, computed in PyTorch."""

    @property
    def metrics(self) -> Collection[str]:
        """Return the names of the predicted metrics, equal to those of the measured metrics."""
        ...

    @property
    def bench(self) -> EngineBench:
        """Return the bench that measures the checkpoint and the original model in PyTorch."""
        ...

    def covers(self, spec: ModelSpec) -> bool:
        """Return True if PyTorch reproduces the quantization of an engine with this spec."""
        ...

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        """Return predictions for the engine from measurements of the checkpoint.

        `observed` has the measurements of the checkpoint in PyTorch, `baseline` the values of the original model's
        engine by metric.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Input of one evaluation.

    Attributes:
        recipe: configs of the model, the steps and the runtime.
        source: source of the uncompressed model.
        steps: compression steps with their names, in the order of application.
        runtime: runtime that builds and opens the engine.
        reference: runtime whose logits every engine is compared with.
        bench: probes to run on the engine.
        quality_predictor: predictor of the quality metrics; None if the bench measures no quality.
        lease: lease on the device, taken for measurements and for work that uses all cores.
        target: device and run settings of the engine.
        device: machine that measures. It emulates the limits of the target if the target names another device.
        limits: limits on the result.
        calibration: text that compression steps read.
        stop_early: stop after the first rung at which a limit is certainly violated.
    """

    recipe: Recipe
    source: ModelSource
    steps: tuple[tuple[str, Step], ...]
    runtime: Runtime
    reference: Runtime
    bench: EngineBench
    quality_predictor: QualityPredictor | None
    lease: Lease
    target: Target
    device: Device
    limits: tuple[Limit, ...]
    calibration: Text
    stop_early: bool = True
