"""Compare the next champion with the present one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.result import Measurement
from edgeopt.core.study_snapshot import Direction
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class NotWorse:
    """Require that a new champion is not worse than the present one.

    Attributes:
        metrics: metric to direction. The new value must not lie beyond the worse end of the champion's interval.
        better: metric to direction. The whole new interval must be better than the champion's whole interval.
    """

    metrics: Mapping[str, Direction]
    better: Mapping[str, Direction] | None = None

    def __post_init__(self) -> None:
        if not self.metrics and not self.better:
            raise ConfigError(
                "`metrics` must contain at least one metric",
                location="metrics",
                hint="Add a metric, or remove the gate",
            )

    def check(self, candidate: Candidate) -> GateVerdict:
        """Compare the candidate with the champion. A candidate that does not become champion passes."""
        if "champion" not in candidate.aliases or candidate.champion is None:
            becomes_champion = "champion" in candidate.aliases
            evidence = "no present champion to compare with" if becomes_champion else "does not become champion"
            return GateVerdict(gate="champion", passed=True, evidence=evidence)
        problems = [self._problem_if_worse(candidate, m, d) for m, d in self.metrics.items()]
        problems += [self._problem_unless_better(candidate, m, d) for m, d in (self.better or {}).items()]
        evidence = "; ".join(filter(None, problems))
        return GateVerdict(gate="champion", passed=not evidence, evidence=evidence or "not worse than the champion")

    def _problem_if_worse(self, candidate: Candidate, metric: str, direction: Direction) -> str:
        new, old = _measurements(candidate, metric)
        if new is None or old is None:
            return _not_measured(metric, new)
        worse = new.value > old.high if direction == "minimize" else new.value < old.low
        return f"{metric} is {new.value:.4g}, the champion has {old.low:.4g} to {old.high:.4g}" if worse else ""

    def _problem_unless_better(self, candidate: Candidate, metric: str, direction: Direction) -> str:
        new, old = _measurements(candidate, metric)
        if new is None or old is None:
            return _not_measured(metric, new)
        better = new.high < old.low if direction == "minimize" else new.low > old.high
        champion_interval = f"{old.low:.4g} to {old.high:.4g}"
        text = f"{metric} is {new.low:.4g} to {new.high:.4g}, not better than the champion's {champion_interval}"
        return "" if better else text


def _measurements(candidate: Candidate, metric: str) -> tuple[Measurement | None, Measurement | None]:
    """Return the measurements of the candidate and of the champion."""
    assert candidate.champion is not None
    return candidate.trial.measurement(metric), candidate.champion.measurement(metric)


def _not_measured(metric: str, new: Measurement | None) -> str:
    return f"{metric} was not measured for {'this trial' if new is None else 'the champion'}"
