"""What a trial leaves behind: measurements, verdicts, timings and, where it failed, the cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

PREDICTION = "prediction"
"""The rung at which a recipe is refused by arithmetic, before any work."""
_FORMER_RUNGS = {"estimate": PREDICTION}
"""Names that older versions stored for rungs, with today's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One figure with its 95 % confidence interval [low, high] and how it was obtained.

    Attributes:
        count: samples behind the figure.
        method: instrument and statistic, for people ("VmHWM of 3 processes, maximum").
        kind: whether an instrument gave the figure, a model of the device did (`estimated`), or arithmetic did before
            there was anything to measure (`predicted`).
        noisy: other processes disturbed it; such a figure proves no limit.
    """

    metric: str
    unit: str
    value: float
    low: float
    high: float
    count: int
    method: str
    kind: Literal["measured", "estimated", "predicted"] = "measured"
    noisy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One limit held against what was measured.

    Attributes:
        bound: the limit in the metric's unit, None where it refers to a baseline that is missing.
        excess: by which share of the bound the worse end of the interval lies beyond it (negative: within);
            None where nothing was measured or the figure is no number.
        satisfied: True only where the whole interval is proven to lie within the limit; of a prediction, which proves
            nothing, where the best that it allows for does.
        reason: why a limit is not kept, empty where it is.
        predicted: whether a prediction was held against the limit, of which only the best that it allows for counts.
    """

    metric: str
    limit: str
    bound: float | None
    value: float | None
    excess: float | None
    satisfied: bool
    reason: str
    predicted: bool = False

    @property
    def message(self) -> str:
        """The metric and why its limit is not kept, in one line."""
        return f"{self.metric} {self.reason}" if self.predicted else f"{self.metric}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a trial ended early: the stage it was in, the kind of error and its message."""

    stage: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """Everything known of one evaluated recipe.

    Attributes:
        recipe: text, digest and descriptions of the recipe.
        device: inventory of the machine that measured; `emulated` where the target is another one.
        engine: folder, digest and bytes of the engine; None where none was built.
        timings_s: seconds by stage; a stage taken from the store counts its look-up alone. `wait` is what all of them
            spent waiting for the device or for another process that made the same.
        saved_s: seconds that what was taken from the store had cost to make, by stage; nothing for what was made now.
            `<stage>/<kind>` where the stage itself was made, and found a part of its work.
        texts: name, digest and size of the texts that calibrated and evaluated, by what they were for.
        system: how busy the machine was meanwhile, reading by reading: figures by name and `at_s`, in s since 1970.
        energy_j: joules that the evaluation took; `energy_method` says whether they were measured, and how.
        artifacts: files and folders worth keeping, by the name they get in the tracking server.
        notes: lint findings and other remarks about the engine.
        predictions: figures from before there was an engine to measure: by arithmetic, or of the checkpoint.
        baseline: values of the uncompressed model on the same runtime by metric; empty before they were measured.
        refused: the rung at which a limit was found broken before all was measured; empty where none was.
    """

    recipe: Mapping[str, Any]
    target: str
    device: Mapping[str, Any]
    emulated: bool
    measurements: tuple[Measurement, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, Any] | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: Failure | None = None
    predictions: tuple[Measurement, ...] = ()
    refused: str = ""
    saved_s: Mapping[str, float] = field(default_factory=dict)
    energy_j: float = 0.0
    energy_method: str = ""
    texts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    system: tuple[Mapping[str, float], ...] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether the trial finished and every limit was measured and proven kept."""
        return (
            not (self.failure or self.refused) and bool(self.measurements) and all(v.satisfied for v in self.verdicts)
        )

    @property
    def metrics(self) -> dict[str, float]:
        return {m.metric: m.value for m in self.measurements}

    @property
    def violated(self) -> tuple[Verdict, ...]:
        """Verdicts on limits that are surely broken: by the best that was predicted, or by a whole interval."""
        ends = {m.metric: (m.low, m.high) for m in self.measurements if not m.noisy}
        return tuple(v for v in self.verdicts if _surely_broken(v, ends.get(v.metric)))

    @property
    def paths(self) -> list[Path]:
        """Files and folders that the result names and does not hold."""
        engine = [] if self.engine is None else [self.engine["directory"]]
        return [Path(path) for path in (*engine, *self.artifacts.values())]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialResult:
        fields = dict(data)
        fields["measurements"] = tuple(Measurement(**m) for m in fields["measurements"])
        fields["verdicts"] = tuple(Verdict(**with_current_names(v)) for v in fields["verdicts"])
        fields["notes"] = tuple(fields["notes"])
        fields["system"] = tuple(fields.get("system", ()))
        fields["predictions"] = tuple(Measurement(**m) for m in fields.get("predictions", ()))
        fields["refused"] = current_rung(fields.get("refused", ""))
        fields["failure"] = Failure(**fields["failure"]) if fields["failure"] else None
        return cls(**fields)


def with_current_names(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored verdict; older versions called `satisfied` `kept`."""
    return {"satisfied" if name == "kept" else name: value for name, value in verdict.items()}


def current_rung(name: str) -> str:
    """Return today's name of a stored rung."""
    return _FORMER_RUNGS.get(name, name)


def skipped_work(refused: str) -> str:
    """What was not done any more once a limit was found broken at the rung `refused`."""
    return {PREDICTION: "nothing was built", "divergence": "no engine was built"}.get(
        refused, f"nothing was measured after {refused}"
    )


def _surely_broken(verdict: Verdict, ends: tuple[float, float] | None) -> bool:
    if verdict.excess is None or verdict.excess <= 0 or verdict.bound is None:
        return False
    if verdict.predicted:
        return True
    return ends is not None and (ends[0] > verdict.bound or ends[1] < verdict.bound)
