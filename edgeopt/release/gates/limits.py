"""Check measurements against the limits of the study and of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.result import Measurement
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsKept:
    """Require that the trial is feasible and that every limit of the study was measured and satisfied."""

    def check(self, candidate: Candidate) -> GateVerdict:
        """Check the trial's excess over each limit of the study."""
        trial, problems = candidate.snapshot, []
        if not trial.feasible:
            problems.append("the trial is not feasible")
        for limit in candidate.limits:
            excess = trial.excess.get(limit.metric)
            if trial.metrics.get(limit.metric) is None or excess is None:
                problems.append(f"{limit.metric} was not measured")
            elif excess > 0:
                problems.append(f"{limit.metric} is {excess:.1%} beyond its limit ({limit.text})")
        return GateVerdict(
            gate="limits",
            passed=not problems,
            evidence="; ".join(problems) or f"{len(candidate.limits)} limits of the study measured and satisfied",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """Require that the whole interval of each measurement is within a limit of the policy.

    Attributes:
        limits: metric to limit, such as `3 GiB`, `at least 0.6` or `0.001`, in the syntax of a target's limits.
            A limit relative to the baseline is not allowed.
    """

    limits: Mapping[str, str | float]

    def __post_init__(self) -> None:
        if not self.limits:
            raise ConfigError(
                "`limits` must contain at least one limit", location="limits", hint="Add a limit, or remove the gate"
            )
        for metric, value in self.limits.items():
            if "baseline" in str(value):
                raise ConfigError(
                    f"The limit must not be relative to a baseline, got {value!r}",
                    location=f"limits.{metric}",
                    hint="Use a quantity such as '512 MiB' or 0.001",
                )

    def check(self, candidate: Candidate) -> GateVerdict:
        """Check the measurements of the trial."""
        problems = [p for metric, value in self.limits.items() if (p := _problem(candidate, metric, value))]
        evidence = "; ".join(problems) or f"{len(self.limits)} limits of the policy satisfied"
        return GateVerdict(gate="within", passed=not problems, evidence=evidence)


def _problem(candidate: Candidate, metric: str, value: str | float) -> str:
    measurement = candidate.trial.measurement(metric)
    if measurement is None:
        return f"{metric} was not measured"
    try:
        limit = Limit.parse(metric, value, {metric: measurement.unit})
    except ConfigError as error:
        return str(error)
    assert limit.absolute is not None
    satisfied = measurement.low >= limit.absolute if limit.is_minimum else measurement.high <= limit.absolute
    return "" if satisfied else f"{metric} is {_format(measurement)}, but must be {limit}"


def _format(measurement: Measurement) -> str:
    value = f"{measurement.value:.4g} {measurement.unit}".rstrip()
    is_exact = measurement.low == measurement.high
    return value if is_exact else f"{value} ({measurement.low:.4g} to {measurement.high:.4g})"
