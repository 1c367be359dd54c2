"""Represent the result of a trial: measurements, verdicts, timings and the cause of a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeopt.core.artifact import ArtifactSummary
from edgeopt.core.corpus import TextSummary

PREDICTION = "prediction"
"""Rung that rejects a recipe by arithmetic, before any work."""
_FORMER_RUNGS = {"estimate": PREDICTION}
"""Current name of each rung that older versions stored under another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Value of a metric with its 95 % confidence interval [low, high] and its method.

    Attributes:
        count: number of samples.
        method: instrument and statistic, for people ("VmHWM of 3 processes, maximum").
        kind: `measured` by an instrument, `estimated` by a model of the device, or `predicted` by arithmetic before an
            engine existed.
        noisy: True if other processes disturbed the measurement. A noisy value never satisfies a limit.
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
    """Result of comparing a measurement or a prediction with a limit.

    Attributes:
        bound: limit in the metric's unit; None if it is relative to a baseline that was not measured.
        excess: relative distance of the worse end of the interval beyond the bound, negative within the bound; None if
            the metric was not measured or is not finite.
        satisfied: True if the whole interval of a measurement, or the better end of a prediction, is within the limit.
        reason: the reason why the limit is not satisfied; empty if it is.
        predicted: True if a prediction was judged, by the better end of its interval.
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
        """Return the metric and the reason in one line."""
        return f"{self.metric} {self.reason}" if self.predicted else f"{self.metric}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Stage, error class and message of a failed trial."""

    stage: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UtilizationReading:
    """Utilization of the machine at one moment.

    Attributes:
        at_s: time in seconds since 1970.
        values: values under the names of MLflow's system metrics.
    """

    at_s: float
    values: Mapping[str, float]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UtilizationReading:
        """Read a reading; older versions stored the values beside `at_s`."""
        values = data["values"] if "values" in data else {k: v for k, v in data.items() if k != "at_s"}
        return cls(at_s=data["at_s"], values=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """Result of one evaluated recipe.

    Attributes:
        recipe: text, digest and configs of the recipe.
        target: name of the target.
        device: inventory of the measuring machine.
        emulated: True if the target is another kind of machine.
        engine: folder, digest and size of the engine; None if none was built.
        timings_s: seconds by stage. A stage found in the cache counts its lookup only. `wait` is the time that all
            stages waited for the device or for another process with the same work.
        saved_s: seconds that cached work originally took, by stage. The key is `<stage>/<kind>` for cached work inside
            a stage that ran.
        texts: the texts by role (`calibration`, `evaluation`).
        system: utilization of the machine during the trial.
        energy_j: energy of the evaluation in joules.
        energy_method: instrument or model of `energy_j`.
        artifacts: files and folders to record, by name on the tracking server.
        notes: lint findings and other remarks about the engine.
        predictions: metrics predicted before an engine existed, from arithmetic or from the checkpoint.
        baseline: values of the uncompressed model on the same runtime by metric; empty before they are measured.
        refused: rung at which a violated limit ended the trial early; empty if none did.
    """

    recipe: Mapping[str, Any]
    target: str
    device: Mapping[str, Any]
    emulated: bool
    measurements: tuple[Measurement, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    engine: ArtifactSummary | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: Failure | None = None
    predictions: tuple[Measurement, ...] = ()
    refused: str = ""
    saved_s: Mapping[str, float] = field(default_factory=dict)
    energy_j: float = 0.0
    energy_method: str = ""
    texts: Mapping[str, TextSummary] = field(default_factory=dict)
    system: tuple[UtilizationReading, ...] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)

    @property
    def recipe_text(self) -> str:
        """Return the names of the recipe's steps; empty if the recipe is unknown."""
        return str(self.recipe.get("text", ""))

    @property
    def recipe_digest(self) -> str:
        """Return the digest of the recipe; empty if the recipe is unknown."""
        return str(self.recipe.get("digest", ""))

    @property
    def device_name(self) -> str:
        """Return the name of the measuring machine; empty if it is unknown."""
        return str(self.device.get("name", ""))

    @property
    def feasible(self) -> bool:
        """Return True if the trial finished and measurements satisfy every limit."""
        return (
            not (self.failure or self.refused) and bool(self.measurements) and all(v.satisfied for v in self.verdicts)
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Return measured values by metric."""
        return {m.metric: m.value for m in self.measurements}

    @property
    def violated(self) -> tuple[Verdict, ...]:
        """Return verdicts on limits that are certainly violated.

        The whole interval of a measurement, or the better end of a prediction, violates the limit.
        """
        intervals = {m.metric: (m.low, m.high) for m in self.measurements if not m.noisy}
        return tuple(v for v in self.verdicts if _is_certainly_violated(v, intervals.get(v.metric)))

    @property
    def paths(self) -> list[Path]:
        """Return the files and folders that the result refers to."""
        engine = [] if self.engine is None else [self.engine.directory]
        return [Path(path) for path in (*engine, *self.artifacts.values())]

    def to_json(self) -> dict[str, Any]:
        """Return the result in plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialResult:
        """Read a result, including results of older versions."""
        fields = dict(data)
        fields["measurements"] = tuple(Measurement(**m) for m in fields["measurements"])
        fields["verdicts"] = tuple(Verdict(**with_current_names(v)) for v in fields["verdicts"])
        fields["notes"] = tuple(fields["notes"])
        fields["system"] = tuple(UtilizationReading.from_json(reading) for reading in fields.get("system", ()))
        fields["predictions"] = tuple(Measurement(**m) for m in fields.get("predictions", ()))
        fields["refused"] = current_rung(fields.get("refused", ""))
        fields["failure"] = Failure(**fields["failure"]) if fields["failure"] else None
        fields["engine"] = ArtifactSummary(**fields["engine"]) if fields["engine"] else None
        fields["texts"] = {role: TextSummary(**text) for role, text in fields.get("texts", {}).items()}
        return cls(**fields)


def with_current_names(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored verdict; older versions called `satisfied` `kept`."""
    return {"satisfied" if name == "kept" else name: value for name, value in verdict.items()}


def current_rung(name: str) -> str:
    """Return the current name of a stored rung."""
    return _FORMER_RUNGS.get(name, name)


def skipped_work(refused: str) -> str:
    """Return a phrase for the work that was skipped after the rung `refused` ended a trial early."""
    return {PREDICTION: "nothing was built", "divergence": "no engine was built"}.get(
        refused, f"nothing was measured after {refused}"
    )


def _is_certainly_violated(verdict: Verdict, interval: tuple[float, float] | None) -> bool:
    if verdict.excess is None or verdict.excess <= 0 or verdict.bound is None:
        return False
    if verdict.predicted:
        return True
    return interval is not None and (interval[0] > verdict.bound or interval[1] < verdict.bound)
