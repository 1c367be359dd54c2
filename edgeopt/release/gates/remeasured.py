"""The gate that measures an engine once more, on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeopt.core.result import Measurement
from edgeopt.core.study_snapshot import Direction, LimitSnapshot
from edgeopt.errors import ConfigError, EdgeoptError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Remeasured:
    """Measured anew, the engine keeps the study's limits and is nowhere worse than its trial said.

    Attributes:
        metrics: metric → direction.
        tolerance: by which share of the trial's figure the new interval may lie beyond the trial's.
        all: whether members are measured too that no alias would point at.
    """

    metrics: Mapping[str, Direction]
    tolerance: float = 0.1
    all: bool = False

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError("no metric is named", location="metrics", hint="Name one, or leave the gate out")
        if not self.tolerance >= 0:
            raise ConfigError(f"{self.tolerance:g} tolerates nothing", location="tolerance", hint="Give 0 or more")

    def check(self, candidate: Candidate) -> GateVerdict:
        if not candidate.aliases and not self.all:
            return GateVerdict(gate="remeasured", passed=True, evidence="no alias would point at it")
        if candidate.remeasure is None:
            return GateVerdict(gate="remeasured", passed=False, evidence="nothing here can measure it")
        try:
            figures = candidate.remeasure(candidate.engine(), self.metrics)
        except EdgeoptError as error:
            return GateVerdict(gate="remeasured", passed=False, evidence=f"it cannot be measured: {error}")
        found = {figure.metric: figure for figure in figures}
        faults = [fault for metric in self.metrics if (fault := self._fault(candidate, metric, found.get(metric)))]
        faults += _beyond(candidate.limits, found)
        told = "; ".join(faults) or f"{', '.join(f'{m} {found[m].value:.4g} {found[m].unit}' for m in self.metrics)}"
        return GateVerdict(gate="remeasured", passed=not faults, evidence=" ".join(told.split()))

    def _fault(self, candidate: Candidate, metric: str, new: Measurement | None) -> str:
        then = candidate.trial.measurement(metric)
        if new is None or then is None:
            return f"{metric} was not measured {'now' if new is None else 'in its trial'}"
        if new.noisy:
            return f"{metric} was disturbed by other processes"
        room = self.tolerance * abs(then.value)
        worse = new.low > then.high + room if self.metrics[metric] == "minimize" else new.high < then.low - room
        shown = f"{metric} is {new.low:.4g} to {new.high:.4g} {new.unit} now".strip()
        return f"{shown}, it was {then.low:.4g} to {then.high:.4g}" if worse else ""


def _beyond(limits: Sequence[LimitSnapshot], found: Mapping[str, Measurement]) -> list[str]:
    """Return one sentence for each limit of the study that the whole interval of a new measurement exceeds."""
    faults = []
    for limit in limits:
        measured = found.get(limit.metric)
        if measured is None or limit.bound is None:
            continue
        if measured.high < limit.bound if limit.is_lower_bound else measured.low > limit.bound:
            faults.append(f"{limit.metric} is {measured.value:.4g} now, beyond its limit ({limit.text})")
    return faults
