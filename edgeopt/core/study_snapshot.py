"""Describe a study at one moment: objectives, limits, trials and Pareto front, as frozen data.

`edgeopt front --json` prints a snapshot, and the run of a study keeps one as `front/trials.json`. Reports, charts,
pages and release gates read snapshots and nothing else of a study.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgeopt.core.result import PREDICTION, current_rung

Direction = Literal["minimize", "maximize"]
TrialState = Literal["waiting", "running", "finished", "stopped", "refused", "failed"]
OutcomeKind = Literal["waiting", "running", "front", "feasible", "infeasible", "refused", "stopped", "failed"]
"""How a trial ended, or that it has not ended yet. `OUTCOMES` has the words for people."""

OUTCOMES: Mapping[OutcomeKind, str] = {
    "front": "on the front",
    "feasible": "feasible",
    "infeasible": "infeasible",
    "refused": "refused by prediction",
    "stopped": "stopped early",
    "failed": "failed",
    "waiting": "waiting",
    "running": "running",
}
"""The one phrase for each outcome: in the command line, pages, reports, MLflow and the documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSnapshot:
    """A metric that the study optimizes."""

    metric: str
    unit: str
    direction: Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSnapshot:
    """A hard limit of the study.

    Attributes:
        text: the limit as written, such as `at most 0.6 x baseline`.
        bound: the limit in the unit of the metric; None while the baseline it refers to was not measured.
    """

    metric: str
    text: str
    bound: float | None
    unit: str

    @property
    def is_lower_bound(self) -> bool:
        """Return True if the metric must be at least `bound`."""
        return self.text.startswith("at least")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSnapshot:
    """One trial.

    Attributes:
        pareto_rank: 1 on the front, 2 on the front of the rest, and so on; None if the trial is not feasible.
        origin: what proposed the recipe: `enqueued`, `spread`, `sampled` or `refined`.
        params: the searched parameters.
        metrics: measured values by metric.
        intervals: 95 % confidence intervals (low, high) of `metrics`, where an interval has width.
        baseline: values of the uncompressed model on the same runtime, by metric, where they were measured.
        predicted: values predicted by arithmetic or from the checkpoint.
        excess: by metric of a limit, the relative distance of the worse end of the interval beyond the limit;
            0 or negative is within the limit, None if the metric was not measured.
        disturbed: metrics within their limit that other processes disturbed, so that the limit is not satisfied.
        rung: the rung at which the trial was refused or stopped early; empty if it was neither.
        run_id: MLflow run; None before the trial has one.
        failure: stage and message of the error; None if nothing failed.
    """

    number: int
    state: TrialState
    feasible: bool
    pareto_rank: int | None
    origin: str = "sampled"
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    excess: Mapping[str, float | None] = field(default_factory=dict)
    disturbed: tuple[str, ...] = ()
    rung: str = ""
    run_id: str | None = None
    failure: str | None = None

    @property
    def is_over(self) -> bool:
        """Return True unless the trial waits or runs."""
        return self.state not in ("waiting", "running")

    @property
    def on_front(self) -> bool:
        """Return True if no other feasible trial dominates this one."""
        return self.feasible and self.pareto_rank == 1

    @property
    def outcome(self) -> OutcomeKind:
        """Return how the trial ended."""
        if self.state in ("waiting", "running"):
            return "waiting" if self.state == "waiting" else "running"
        if self.failure or self.state == "failed":
            return "failed"
        if self.on_front:
            return "front"
        if self.feasible:
            return "feasible"
        if self.rung:
            return "refused" if self.rung == PREDICTION else "stopped"
        return "infeasible"

    @property
    def outcome_text(self) -> str:
        """Return the outcome in words; a trial that was stopped early names its rung."""
        words = OUTCOMES[self.outcome]
        return f"{words} at {self.rung}" if self.outcome == "stopped" else words

    @property
    def exceeded(self) -> dict[str, float]:
        """Return the limits that the trial exceeds: metric to relative excess."""
        return {metric: excess for metric, excess in self.excess.items() if excess is not None and excess > 0}

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Return the metrics of limits that were not measured."""
        return tuple(metric for metric, excess in self.excess.items() if excess is None)

    @property
    def is_disturbed(self) -> bool:
        """Return True if the trial is infeasible only because other processes disturbed a measurement."""
        return self.outcome == "infeasible" and not self.exceeded and not self.unmeasured

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types, as `edgeopt front --json` prints them."""
        return {
            "number": self.number,
            "state": self.state,
            "outcome": self.outcome_text,
            "feasible": self.feasible,
            "pareto_rank": self.pareto_rank,
            "origin": self.origin,
            "params": dict(self.params),
            "metrics": dict(self.metrics),
            "intervals": {metric: list(ends) for metric, ends in self.intervals.items()},
            "baseline": dict(self.baseline),
            "predicted": dict(self.predicted),
            "excess": dict(self.excess),
            "disturbed": list(self.disturbed),
            "refused": self.rung,
            "run_id": self.run_id,
            "failure": self.failure,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialSnapshot:
        """Build a trial from `to_json`, also of versions that stored fewer fields."""
        return cls(
            number=int(data["number"]),
            state=data["state"],
            feasible=bool(data["feasible"]),
            pareto_rank=data["pareto_rank"],
            origin=data.get("origin", ""),
            params=data["params"],
            metrics=data["metrics"],
            intervals={metric: (low, high) for metric, (low, high) in data.get("intervals", {}).items()},
            baseline=data.get("baseline", {}),
            predicted=data.get("predicted", {}),
            excess=data["excess"],
            disturbed=tuple(data.get("disturbed", ())),
            rung=current_rung(data.get("refused", "")),
            run_id=data["run_id"],
            failure=data["failure"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """The version of a registered model to which the alias `champion` points.

    Attributes:
        trial: number of the trial that the version was registered from; None if that is not known.
    """

    name: str
    version: str
    trial: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"name": self.name, "version": self.version, "trial": self.trial}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySnapshot:
    """A study at one moment.

    Attributes:
        trials: all trials, by number.
        champion: the champion that comes from this study; None if there is none.
    """

    study: str
    objectives: tuple[ObjectiveSnapshot, ...]
    limits: tuple[LimitSnapshot, ...]
    trials: tuple[TrialSnapshot, ...]
    champion: Champion | None = None

    @property
    def front(self) -> tuple[TrialSnapshot, ...]:
        """Return the feasible trials that no other trial dominates."""
        return tuple(trial for trial in self.trials if trial.on_front)

    @property
    def feasible(self) -> tuple[TrialSnapshot, ...]:
        """Return the trials that satisfy every limit."""
        return tuple(trial for trial in self.trials if trial.feasible)

    @property
    def baseline(self) -> dict[str, float]:
        """Return values of the uncompressed model by metric, if all trials agree on its runtime.

        Trials on different runtimes have different baselines. A metric on which they differ is left out.
        """
        values: dict[str, set[float]] = {}
        for trial in self.trials:
            for metric, value in trial.baseline.items():
                values.setdefault(metric, set()).add(value)
        return {metric: next(iter(found)) for metric, found in values.items() if len(found) == 1}

    def limit_on(self, metric: str) -> LimitSnapshot | None:
        """Return the limit on a metric; None if it has none."""
        return next((limit for limit in self.limits if limit.metric == metric), None)

    def with_objectives(self, objectives: tuple[ObjectiveSnapshot, ...]) -> StudySnapshot:
        """Return the same study with its objectives in another order, or with fewer of them."""
        return replace(self, objectives=objectives)

    def to_json(self) -> dict[str, Any]:
        """Return the document of `edgeopt front --json`."""
        return {
            "study": self.study,
            "objectives": [{"metric": o.metric, "unit": o.unit, "direction": o.direction} for o in self.objectives],
            "limits": [{"metric": x.metric, "limit": x.text, "bound": x.bound, "unit": x.unit} for x in self.limits],
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.number for trial in self.front],
            "champion": None if self.champion is None else self.champion.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudySnapshot:
        """Build a snapshot from `to_json`, also of versions that stored fewer fields."""
        champion = data.get("champion")
        return cls(
            study=data["study"],
            objectives=tuple(ObjectiveSnapshot(**objective) for objective in data["objectives"]),
            limits=tuple(
                LimitSnapshot(metric=x["metric"], text=x["limit"], bound=x["bound"], unit=x["unit"])
                for x in data["limits"]
            ),
            trials=tuple(TrialSnapshot.from_json(trial) for trial in data["trials"]),
            champion=None if champion is None else Champion(**champion),
        )
