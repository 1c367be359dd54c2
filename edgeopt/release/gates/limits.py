"""The gates that hold figures against limits: the study's own, and further ones of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.result import Measurement
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsKept:
    """The trial is feasible, and every limit of the study was measured in it and kept."""

    def check(self, candidate: Candidate) -> GateVerdict:
        trial, faults = candidate.snapshot, []
        if not trial.feasible:
            faults.append("the trial is not feasible")
        for limit in candidate.limits:
            excess = trial.excess.get(limit.metric)
            if trial.metrics.get(limit.metric) is None or excess is None:
                faults.append(f"{limit.metric} was not measured")
            elif excess > 0:
                faults.append(f"{limit.metric} is {excess:.1%} beyond its limit ({limit.text})")
        return GateVerdict(
            gate="limits",
            passed=not faults,
            evidence="; ".join(faults) or f"{len(candidate.limits)} limits measured and kept",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """Every figure lies with its whole interval within a limit of the policy.

    Attributes:
        limits: metric → limit, such as `3 GiB`, `at least 0.6` or `0.001`, with the syntax of a target's limits.
            A limit relative to the baseline is not allowed.
    """

    limits: Mapping[str, str | float]

    def __post_init__(self) -> None:
        if not self.limits:
            raise ConfigError("no limit is named", location="limits", hint="Name one, or leave the gate out")
        for metric, value in self.limits.items():
            if "baseline" in str(value):
                raise ConfigError(
                    f"The limit must not be relative to a baseline, got {value!r}",
                    location=f"limits.{metric}",
                    hint="Use a quantity such as '512 MiB' or 0.001",
                )

    def check(self, candidate: Candidate) -> GateVerdict:
        faults = [fault for metric, value in self.limits.items() if (fault := _fault(candidate, metric, value))]
        evidence = "; ".join(faults) or f"{len(self.limits)} limits of the policy kept"
        return GateVerdict(gate="within", passed=not faults, evidence=evidence)


def _fault(candidate: Candidate, metric: str, value: str | float) -> str:
    figure = candidate.trial.measurement(metric)
    if figure is None:
        return f"{metric} was not measured"
    try:
        limit = Limit.parse(metric, value, {metric: figure.unit})
    except ConfigError as error:
        return str(error)
    assert limit.absolute is not None
    return "" if _kept(figure, limit.absolute, limit.is_minimum) else f"{metric} is {_told(figure)}, allowed is {limit}"


def _kept(figure: Measurement, bound: float, is_minimum: bool) -> bool:
    return figure.low >= bound if is_minimum else figure.high <= bound


def _told(figure: Measurement) -> str:
    return f"{figure.value:.4g} {figure.unit} ({figure.low:.4g} to {figure.high:.4g})".replace("  ", " ")
