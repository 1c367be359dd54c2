"""Measure an engine again on this machine and compare with its trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeopt.core.result import Measurement
from edgeopt.core.study_snapshot import Direction, LimitSnapshot
from edgeopt.errors import ConfigError, EdgeoptError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Remeasured:
    """Require that new measurements satisfy the study's limits and are not worse than the trial's.

    Attributes:
        metrics: metric to direction.
        tolerance: allowed distance of the new interval beyond the trial's interval, as a share of the trial's value.
        all: measure every candidate, also one that gets no alias.
    """

    metrics: Mapping[str, Direction]
    tolerance: float = 0.1
    all: bool = False

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(
                "`metrics` must contain at least one metric",
                location="metrics",
                hint="Add a metric, or remove the gate",
            )
        if not self.tolerance >= 0:
            raise ConfigError(
                f"`tolerance` must be at least 0, got {self.tolerance:g}",
                location="tolerance",
                hint="Give a share such as 0.1",
            )

    def check(self, candidate: Candidate) -> GateVerdict:
        """Measure the candidate's engine and compare. A candidate without an alias passes unless `all` is set."""
        if not candidate.aliases and not self.all:
            return GateVerdict(gate="remeasured", passed=True, evidence="gets no alias, so it is not measured again")
        if candidate.remeasure is None:
            return GateVerdict(gate="remeasured", passed=False, evidence="this command cannot measure engines")
        try:
            measurements = candidate.remeasure(candidate.engine(), self.metrics)
        except EdgeoptError as error:
            evidence = f"the engine cannot be measured: {error}"
            return GateVerdict(gate="remeasured", passed=False, evidence=evidence)
        by_metric = {measurement.metric: measurement for measurement in measurements}
        problems = [p for metric in self.metrics if (p := self._problem(candidate, metric, by_metric.get(metric)))]
        problems += _exceeded_limits(candidate.limits, by_metric)
        evidence = "; ".join(problems) or ", ".join(
            f"{metric} {by_metric[metric].value:.4g} {by_metric[metric].unit}" for metric in self.metrics
        )
        return GateVerdict(gate="remeasured", passed=not problems, evidence=" ".join(evidence.split()))

    def _problem(self, candidate: Candidate, metric: str, new: Measurement | None) -> str:
        recorded = candidate.trial.measurement(metric)
        if new is None or recorded is None:
            return f"{metric} was not measured {'now' if new is None else 'in its trial'}"
        if new.noisy:
            return f"{metric} was disturbed by other processes"
        margin = self.tolerance * abs(recorded.value)
        if self.metrics[metric] == "minimize":
            worse = new.low > recorded.high + margin
        else:
            worse = new.high < recorded.low - margin
        text = f"{metric} is {new.low:.4g} to {new.high:.4g} {new.unit} now".strip()
        return f"{text}, it was {recorded.low:.4g} to {recorded.high:.4g}" if worse else ""


def _exceeded_limits(limits: Sequence[LimitSnapshot], measurements: Mapping[str, Measurement]) -> list[str]:
    """Return one sentence for each limit of the study that the whole interval of a new measurement exceeds.

    The sentence quotes the better end of the interval, because that end decides.
    """
    problems = []
    for limit in limits:
        new = measurements.get(limit.metric)
        if new is None or limit.bound is None:
            continue
        exceeded = new.high < limit.bound if limit.is_lower_bound else new.low > limit.bound
        best = f"at most {new.high:.4g}" if limit.is_lower_bound else f"at least {new.low:.4g}"
        if exceeded:
            problems.append(f"{limit.metric} is {new.value:.4g} now ({best}), beyond its limit ({limit.text})")
    return problems
