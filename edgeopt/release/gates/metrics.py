"""Check that metrics were measured, and how."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from edgeopt.core import mlflow_tags as tags
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, GateVerdict

_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredMetrics:
    """Require that every metric in `metrics` was measured, under the given conditions.

    Attributes:
        estimated: accept estimates from a model of the device in addition to measurements.
        count: minimum number of samples per metric.
        device: name of the machine that must have measured; None accepts every machine.
        emulated: accept measurements from another kind of machine than the target.
        max_age_days: maximum days since the end of the trial; None sets no maximum.
    """

    metrics: tuple[str, ...]
    estimated: bool = False
    count: int = 1
    device: str | None = None
    emulated: bool = True
    max_age_days: float | None = None

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(
                "`metrics` must contain at least one metric",
                location="metrics",
                hint="Add a metric, or remove the gate",
            )
        if self.count < 1:
            raise ConfigError(f"`count` must be at least 1, got {self.count}", location="count", hint="Give 1 or more")
        if self.max_age_days is not None and self.max_age_days <= 0:
            raise ConfigError(
                f"`max_age_days` must be above 0, got {self.max_age_days:g}",
                location="max_age_days",
                hint="Give a positive number, or remove the key",
            )

    def check(self, candidate: Candidate) -> GateVerdict:
        """Check the measurements of the trial and the tags of its run."""
        problems = [problem for metric in self.metrics if (problem := self._problem(candidate, metric))]
        run_tags, age_s = candidate.run_tags, time.time() - candidate.trial.ended_s
        if self.device is not None and run_tags.get(tags.DEVICE) != self.device:
            measured_on = run_tags.get(tags.DEVICE) or "an unknown device"
            problems.append(f"measured on {measured_on}, but the policy requires {self.device}")
        if not self.emulated and run_tags.get(tags.EMULATED) != "false":
            problems.append("measured on another kind of machine than the target")
        if self.max_age_days is not None and age_s > self.max_age_days * _DAY_S:
            problems.append(f"measured {age_s / _DAY_S:.0f} days ago, the maximum is {self.max_age_days:g}")
        evidence = "; ".join(problems) or f"{len(self.metrics)} required metrics measured"
        return GateVerdict(gate="metrics", passed=not problems, evidence=evidence)

    def _problem(self, candidate: Candidate, metric: str) -> str:
        measurement = candidate.trial.measurement(metric)
        if candidate.snapshot.metrics.get(metric) is None or measurement is None:
            estimate = candidate.trial.measurement(metric.replace("/measured/", "/estimated/"))
            return f"{metric} was not measured" + (", only estimated" if estimate is not None else "")
        if measurement.kind != "measured" and not (self.estimated and measurement.kind == "estimated"):
            return f"{metric} is {measurement.kind}, not measured"
        if measurement.count < self.count:
            return f"{metric} has {measurement.count} samples, the minimum is {self.count}"
        return f"{metric} was disturbed by other processes" if measurement.noisy else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingMetrics:
    """Require that every metric in the policy's ranking was measured or estimated. This gate is built in."""

    metrics: tuple[str, ...]

    def check(self, candidate: Candidate) -> GateVerdict:
        """Check as RequiredMetrics does, under another name."""
        verdict = RequiredMetrics(metrics=self.metrics, estimated=True).check(candidate)
        evidence = f"{len(self.metrics)} metrics of the ranking measured" if verdict.passed else verdict.evidence
        return replace(verdict, gate="ranking metrics", evidence=evidence)
