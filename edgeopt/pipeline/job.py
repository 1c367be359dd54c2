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
    """Measures engines: probes bound to a device, a target and an evaluation text."""

    @property
    def evaluation(self) -> Text: ...

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return the probe names by group, in the order of measurement."""
        ...

    @property
    def uncapped(self) -> EngineBench:
        """Return this bench without the target's memory cap, for a model that need not fit the target."""
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
            directory: receives the raw samples, the logs and the scratch folder.
            references: scratch folders of engines to compare with, by role: `baseline`, `checkpoint`.
            isolated: run each probe in fresh processes. Otherwise run them in this process, for references and
                observations that need no timing.
        """
        ...

    def gather(self, folders: Sequence[Path], directory: Path) -> None:
        """Merge `samples.json`, `tables` and `logs` of the measurement folders of one engine into `directory`."""
        ...


class QualityPredictor(Protocol):
    """Predicts the quality of an engine from its compressed checkpoint, computed in PyTorch."""

    @property
    def metrics(self) -> Collection[str]:
        """Return the predicted metrics, under the names of the measured ones."""
        ...

    @property
    def bench(self) -> EngineBench:
        """Return the bench that observes the checkpoint and the original model in this process."""
        ...

    def covers(self, spec: ModelSpec) -> bool:
        """Return True if PyTorch computes such a model like an engine does."""
        ...

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        """Return predictions for the engine from measurements of the checkpoint.

        `baseline` has the values of the original model's engine by metric.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Input of one evaluation.

    Attributes:
        steps: compression steps with their names, in the order of application.
        reference: runtime whose logits every engine is compared with.
        quality_predictor: None if the bench measures no quality.
        lease: lease on the device, taken for measurements and for work that uses all cores.
        device: machine that measures. If the target names another device, this machine emulates its limits.
        limits: limits on the result.
        stop_early: stop after the first rung at which a limit is certainly broken.
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
