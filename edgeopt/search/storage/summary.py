"""A trial's result in short: what the search and the front need of it, small enough for ten thousand trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from edgeopt.core.result import TrialResult, current_rung, with_current_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A verdict without its words; `bound` is the limit in the metric's unit, None where it is not known."""

    excess: float | None
    satisfied: bool
    predicted: bool
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What is kept of a result beside every trial.

    Attributes:
        refused: the rung that stopped it; empty where none did.
        failure: stage and message of what went wrong; None where nothing did.
        timings_s, saved_s: seconds by stage that were spent, and that the cache saved.
        energy_j: joules that were spent, as far as is known.
        intervals: 95 % confidence intervals (low, high) of `metrics`, where an interval has width.
        baseline: values of the uncompressed model on the same runtime, of the metrics that were measured.
    """

    feasible: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    verdicts: Mapping[str, Held] = field(default_factory=dict)
    refused: str = ""
    failure: str | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    saved_s: Mapping[str, float] = field(default_factory=dict)
    energy_j: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, result: TrialResult) -> Summary:
        return cls(
            feasible=result.feasible,
            metrics=result.metrics,
            predicted={m.metric: m.value for m in result.predictions},
            verdicts={
                v.metric: Held(excess=v.excess, satisfied=v.satisfied, predicted=v.predicted, bound=v.bound)
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
        return sum(self.timings_s.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Summary:
        data = json.loads(text)
        verdicts = {metric: Held(**with_current_names(held)) for metric, held in data["verdicts"].items()}
        intervals = {metric: (low, high) for metric, (low, high) in data.get("intervals", {}).items()}
        return cls(**data | {"verdicts": verdicts, "refused": current_rung(data["refused"]), "intervals": intervals})
