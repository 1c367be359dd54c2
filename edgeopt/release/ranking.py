"""Rank the trials of a front: metrics scaled over the front and weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeopt.core.study_snapshot import Direction, TrialSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A metric with its weight: the score that the full range of `metric` over the front adds."""

    metric: str
    direction: Direction
    weight: float


def scores(trials: Sequence[TrialSnapshot], criteria: Sequence[Criterion]) -> dict[int, float]:
    """Return trial number to Σ weight · (value − best) / (worst − best); 0 is best in every criterion.

    A metric on which all trials are equal adds nothing. Every trial must have every metric.
    """
    total = {trial.number: 0.0 for trial in trials}
    for criterion in criteria:
        sign = 1.0 if criterion.direction == "minimize" else -1.0
        values = {trial.number: sign * trial.metrics[criterion.metric] for trial in trials}
        best, spread = min(values.values()), max(values.values()) - min(values.values())
        if spread > 0:
            for number, value in values.items():
                total[number] += criterion.weight * (value - best) / spread
    return total


def first(trials: Sequence[TrialSnapshot], criteria: Sequence[Criterion]) -> int:
    """Return the number of the trial with the lowest score; of equal scores, the lower number."""
    ranked = scores(trials, criteria)
    return min(ranked, key=lambda number: (ranked[number], number))
