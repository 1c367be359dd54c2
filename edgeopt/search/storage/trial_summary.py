"""Summarize a trial's result for the search, small enough to keep 10,000 trials in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from edgeopt.core.result import TrialResult, current_rung, with_current_names


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictSummary:
    """Verdict without its texts.

    Attributes:
        excess: relative distance of the worse end of the interval beyond the bound; None if the metric was not measured
            or is not finite.
        bound: limit in the unit of the metric; None if it is relative to a baseline that was not measured.
    """

    excess: float | None
    satisfied: bool
    predicted: bool
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSummary:
    """Summary of a result, stored with every ended trial.

    Attributes:
        refused: rung that ended the trial early; empty if none did.
        failure: stage and message of the error; None if nothing failed.
        timings_s: seconds spent, by stage.
        saved_s: seconds that the cache saved, by stage.
        energy_j: energy spent in joules; 0 if it is not known.
        intervals: 95 % confidence intervals (low, high) of `metrics`, without those of zero width.
        baseline: values of the uncompressed model on the same runtime, for the measured metrics.
    """

    feasible: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    verdicts: Mapping[str, VerdictSummary] = field(default_factory=dict)
    refused: str = ""
    failure: str | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    saved_s: Mapping[str, float] = field(default_factory=dict)
    energy_j: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_result(cls, result: TrialResult) -> TrialSummary:
        """Summarize a result."""
        return cls(
            feasible=result.feasible,
            metrics=result.metrics,
            predicted={m.metric: m.value for m in result.predictions},
            verdicts={
                v.metric: VerdictSummary(excess=v.excess, satisfied=v.satisfied, predicted=v.predicted, bound=v.bound)
                for v in result.verdicts
            },
            refused=result.refused,
            failure=f"{result.failure.stage}: {result.failure.message}" if result.failure else None,
            timings_s=result.timings_s,
            saved_s=result.saved_s,
            energy_j=result.energy_j,
            intervals={m.metric: (m.low, m.high) for m in result.measurements if m.low != m.high},
            baseline={m: v for m, v in result.baseline.items() if m in result.metrics},
        )

    @property
    def spent_s(self) -> float:
        """Return the seconds spent on the trial, over all stages."""
        return sum(self.timings_s.values())

    def to_json(self) -> str:
        """Return the summary as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialSummary:
        """Parse JSON text, including summaries of older versions."""
        data = json.loads(text)
        verdicts = {metric: VerdictSummary(**with_current_names(v)) for metric, v in data["verdicts"].items()}
        intervals = {metric: (low, high) for metric, (low, high) in data.get("intervals", {}).items()}
        return cls(**data | {"verdicts": verdicts, "refused": current_rung(data["refused"]), "intervals": intervals})
