"""The gate that holds the next champion against the present one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.result import Measurement
from edgeopt.core.study_snapshot import Direction
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class NotWorse:
    """Who becomes champion is nowhere worse than the champion by more than its confidence interval.

    Attributes:
        metrics: metric → direction, in which it may not be worse than the worse end of the champion's interval.
        better: metric → direction, in which its whole interval must be better than the champion's.
    """

    metrics: Mapping[str, Direction]
    better: Mapping[str, Direction] | None = None

    def __post_init__(self) -> None:
        if not self.metrics and not self.better:
            raise ConfigError("no metric is named", location="metrics", hint="Name one, or leave the gate out")

    def check(self, candidate: Candidate) -> GateVerdict:
        if "champion" not in candidate.aliases or candidate.champion is None:
            evidence = "not to be champion" if "champion" not in candidate.aliases else "no other champion to compare"
            return GateVerdict(gate="champion", passed=True, evidence=evidence)
        faults = [self._worse(candidate, m, d) for m, d in self.metrics.items()]
        faults += [self._no_better(candidate, m, d) for m, d in (self.better or {}).items()]
        told = "; ".join(filter(None, faults))
        return GateVerdict(gate="champion", passed=not told, evidence=told or "not worse than the champion")

    def _worse(self, candidate: Candidate, metric: str, direction: Direction) -> str:
        new, old = _both(candidate, metric)
        if new is None or old is None:
            return f"{metric} was not measured of {'this trial' if new is None else 'the champion'}"
        worse = new.value > old.high if direction == "minimize" else new.value < old.low
        return f"{metric} is {new.value:.4g}, the champion has {old.low:.4g} to {old.high:.4g}" if worse else ""

    def _no_better(self, candidate: Candidate, metric: str, direction: Direction) -> str:
        new, old = _both(candidate, metric)
        if new is None or old is None:
            return f"{metric} was not measured of {'this trial' if new is None else 'the champion'}"
        better = new.high < old.low if direction == "minimize" else new.low > old.high
        shown = f"{metric} is {new.low:.4g} to {new.high:.4g}, not better than the champion's"
        return "" if better else f"{shown} {old.low:.4g} to {old.high:.4g}"


def _both(candidate: Candidate, metric: str) -> tuple[Measurement | None, Measurement | None]:
    assert candidate.champion is not None
    return candidate.trial.measurement(metric), candidate.champion.measurement(metric)
