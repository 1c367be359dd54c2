"""What one evaluation is handed: a recipe's parts, how engines are measured, and what is promised of them."""

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
    """How engines are measured: a bench bound to a device, a target and an evaluation text."""

    @property
    def evaluation(self) -> Text: ...

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the probes by group, in the order in which groups are measured."""
        ...

    @property
    def uncapped(self) -> EngineBench:
        """The same without the target's memory cap, for a model that need not fit the target."""
        ...

    def identity(self, probes: Sequence[str]) -> Mapping[str, Any]:
        """Plain data that determines the figures of these probes, for the store."""
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
        fresh: bool = True,
    ) -> tuple[Measurement, ...]:
        """The figures of the named probes, or of all.

        Without `fresh` they collect in this process: they keep a reference for other engines, or nothing is timed.
        """
        ...

    def gather(self, folders: Sequence[Path], directory: Path) -> None:
        """Write `samples.json`, `tables` and `logs` of one engine, measured group by group into `folders`, as one."""
        ...


class QualityPredictor(Protocol):
    """Predicts from a compressed checkpoint, computed in torch, what its engine will be measured to be."""

    @property
    def metrics(self) -> Collection[str]:
        """What is predicted, by the names and units that measurements have."""
        ...

    @property
    def bench(self) -> EngineBench:
        """How a checkpoint is looked at: in this process, against a reference that was looked at alike."""
        ...

    def covers(self, spec: ModelSpec) -> bool:
        """Whether torch computes such a model as an engine does."""
        ...

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        """Figures of the engine from those of the checkpoint; `baseline` maps metrics to the original engine's."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that an evaluation is handed.

    Attributes:
        reference: the runtime whose logits every engine is compared with.
        quality_predictor: None where it could predict nothing that is measured.
        lease: taken while this process measures, or works on all cores.
        device: the machine that measures; the target may name another, whose limits are then emulated.
        limits: kept or broken by the result; those that refer to the baseline make it be measured too.
        stop_early: whether the evaluation ends at the first rung after which a limit is surely broken.
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
