"""Rank the trials of a study and compute the growth of its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective, pareto_front, pareto_ranks
from edgeopt.search.pareto.hypervolume import HypervolumeTracker
from edgeopt.search.storage.trial import EVALUATED_STATES, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Comparison of trials by objectives, among those that satisfy every limit."""

    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]

    def ranks(self, trials: Iterable[Trial]) -> dict[int, int]:
        """Return the Pareto rank of every feasible trial with all objectives measured, by trial number."""
        ranked = self._with_points(trials)
        ranks = pareto_ranks([point for _, point in ranked])
        return {trial.number: rank for (trial, _), rank in zip(ranked, ranks, strict=True)}

    def front(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the feasible trials that no other trial dominates."""
        ranked = self._with_points(trials)
        return [ranked[index][0] for index in pareto_front([point for _, point in ranked])]

    def hypervolume(self, trials: Sequence[Trial], front: Sequence[Trial]) -> float:
        """Return the hypervolume of the front of `trials`, from 0 to 1; see `hypervolume_history`."""
        tracker = self._create_tracker(trials)
        if tracker is None:
            return 0.0
        return max(tracker.add(self._costs(point)) for _, point in self._with_points(front))

    def hypervolume_history(self, trials: Sequence[Trial]) -> list[float]:
        """Return the hypervolume of the front after each evaluated trial, from 0 to 1, in the order of their ends.

        The reference of an objective is its limit. Without a limit it is twice the cost of the first feasible trial.
        Later trials do not change it, so the hypervolume never decreases.
        """
        ended = _by_end(trials)
        tracker = self._create_tracker(trials)
        if tracker is None:
            return [0.0] * len(ended)
        points = map(self.point, ended)
        return [tracker.volume if point is None else tracker.add(self._costs(point)) for point in points]

    def point(self, trial: Trial) -> list[float] | None:
        """Return the objectives of a feasible trial, all to be minimized.

        Return None if the trial is not feasible or an objective is not finite.
        """
        if trial.summary is None or not trial.summary.feasible:
            return None
        values = [o.sign * trial.summary.metrics.get(o.metric, math.nan) for o in self.objectives]
        return values if all(map(math.isfinite, values)) else None

    def _with_points(self, trials: Iterable[Trial]) -> list[tuple[Trial, list[float]]]:
        return [(trial, point) for trial in trials if (point := self.point(trial)) is not None]

    def _create_tracker(self, trials: Sequence[Trial]) -> HypervolumeTracker | None:
        """Return an empty tracker with the reference of this study; None while no trial is feasible."""
        first = next((point for trial in _by_end(trials) if (point := self.point(trial)) is not None), None)
        if first is None:
            return None
        judged = limit_bounds(trials)
        bound = {limit.metric: judged.get(limit.metric, limit.absolute) for limit in self.limits}
        reference = [_reference_cost(o, bound.get(o.metric), x) for o, x in zip(self.objectives, first, strict=True)]
        return HypervolumeTracker(reference)

    def _costs(self, point: Sequence[float]) -> list[float]:
        return [_cost(o, o.sign * x) for o, x in zip(self.objectives, point, strict=True)]


def _reference_cost(objective: Objective, bound: float | None, first: float) -> float:
    """Return the worst cost that contributes to the hypervolume; `first` is the first feasible value, minimized."""
    if bound:
        return _cost(objective, bound)
    twice = 2 * _cost(objective, objective.sign * first)
    return twice if 0 < twice < math.inf else 1.0


def _cost(objective: Objective, value: float) -> float:
    """Return a cost with optimum 0: the value of a minimized metric, the reciprocal of a maximized one."""
    if objective.direction == "minimize":
        return value
    return 1 / value if value > 0 else math.inf


def _by_end(trials: Iterable[Trial]) -> list[Trial]:
    """Return the evaluated trials in the order of their ends."""
    return sorted((t for t in trials if t.state in EVALUATED_STATES), key=lambda t: (t.ended_s or 0.0, t.number))


def total_spent_s(trials: Iterable[Trial]) -> float:
    """Return the seconds spent on all trials, summed over workers."""
    return sum(trial.summary.spent_s for trial in trials if trial.summary is not None)


def total_spent_j(trials: Iterable[Trial]) -> float:
    """Return the joules spent on all trials."""
    return sum(trial.summary.energy_j for trial in trials if trial.summary is not None)


def count_started(trials: Iterable[Trial]) -> int:
    """Return the number of trials that count against the budget once they end."""
    return sum(1 for trial in trials if trial.state != "refused")


def limit_bounds(trials: Iterable[Trial]) -> dict[str, float]:
    """Return the bound of each limit in the unit of its metric, as the verdicts of the trials used it.

    Limits relative to the baseline are included once a trial measured the baseline.
    """
    verdicts = (item for trial in trials if trial.summary is not None for item in trial.summary.verdicts.items())
    return {metric: verdict.bound for metric, verdict in verdicts if verdict.bound is not None}
