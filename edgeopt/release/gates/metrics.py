"""The gate that asks which figures there are, and how they were come by."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edgeopt.core import mlflow_tags as tags
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, GateVerdict

_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredMetrics:
    """Every one of `metrics` was measured, and as is asked for.

    Attributes:
        estimated: whether a figure counts that a model of the device gave and no instrument.
        count: samples behind each figure, at least.
        device: name of the machine that must have measured; None takes any.
        emulated: whether another kind of machine may have measured than the target is.
        max_age_days: how long ago the trial may have ended; None for ever.
    """

    metrics: tuple[str, ...]
    estimated: bool = False
    count: int = 1
    device: str | None = None
    emulated: bool = True
    max_age_days: float | None = None

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError("no metric is named", location="metrics", hint="Name one, or leave the gate out")
        if self.count < 1:
            raise ConfigError(f"{self.count} samples prove nothing", location="count", hint="Give 1 or more")
        if self.max_age_days is not None and self.max_age_days <= 0:
            raise ConfigError(
                f"{self.max_age_days:g} days ago is never", location="max_age_days", hint="Give more than 0"
            )

    def check(self, candidate: Candidate) -> GateVerdict:
        faults = [fault for metric in self.metrics if (fault := self._fault(candidate, metric))]
        tagged, age_s = candidate.run_tags, time.time() - candidate.trial.ended_s
        if self.device is not None and tagged.get(tags.DEVICE) != self.device:
            faults.append(f"measured on {tagged.get(tags.DEVICE) or 'an unknown device'}, asked for is {self.device}")
        if not self.emulated and tagged.get(tags.EMULATED) != "false":
            faults.append("measured on another kind of machine than the target")
        if self.max_age_days is not None and age_s > self.max_age_days * _DAY_S:
            faults.append(f"measured {age_s / _DAY_S:.0f} days ago, allowed are {self.max_age_days:g}")
        evidence = "; ".join(faults) or f"{len(self.metrics)} metrics measured"
        return GateVerdict(gate="metrics", passed=not faults, evidence=evidence)

    def _fault(self, candidate: Candidate, metric: str) -> str:
        figure = candidate.trial.measurement(metric)
        if candidate.snapshot.metrics.get(metric) is None or figure is None:
            estimated = candidate.trial.measurement(metric.replace("/measured/", "/estimated/"))
            return f"{metric} was not measured" + (", only estimated" if estimated is not None else "")
        if figure.kind != "measured" and not (self.estimated and figure.kind == "estimated"):
            return f"{metric} is {figure.kind}, not measured"
        if figure.count < self.count:
            return f"{metric} has {figure.count} samples, asked for are {self.count}"
        return f"{metric} was disturbed by other processes" if figure.noisy else ""
