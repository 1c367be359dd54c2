"""Where a study stands: which trials are best, and how the front grew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective, pareto_front, pareto_ranks
from edgeopt.search.pareto.hypervolume import Archive
from edgeopt.search.storage.trial import Row

EVALUATED = ("finished", "stopped", "failed")
"""States of trials that cost work, and count against the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Trials held against one another, by objectives, among those that keep every limit."""

    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]

    def ranks(self, rows: Iterable[Row]) -> dict[int, int]:
        """Pareto rank of every feasible trial whose objectives were all measured, by trial number."""
        kept = self._kept(rows)
        return {row.number: rank for (row, _), rank in zip(kept, pareto_ranks([p for _, p in kept]), strict=True)}

    def front(self, rows: Iterable[Row]) -> list[Row]:
        """The feasible trials that no other dominates."""
        kept = self._kept(rows)
        return [kept[index][0] for index in pareto_front([point for _, point in kept])]

    def volume(self, rows: Sequence[Row], front: Sequence[Row]) -> float:
        """The hypervolume of the front of `rows`, from 0 to 1: see `volumes`."""
        archive = self._archive(rows)
        if archive is None:
            return 0.0
        return max(archive.add(self._costs(point)) for _, point in self._kept(front))

    def volumes(self, rows: Sequence[Row]) -> list[float]:
        """The hypervolume of the front after each evaluated trial, in the order in which they ended; from 0 to 1.

        It is a share of what lies between nothing at all and the limits. Of an objective without a limit, what is
        twice as bad as the first feasible trial takes the limit's place. So it never falls, whatever comes later.
        """
        ended = _ended(rows)
        archive = self._archive(rows)
        if archive is None:
            return [0.0] * len(ended)
        points = map(self.point, ended)
        return [archive.volume if point is None else archive.add(self._costs(point)) for point in points]

    def point(self, row: Row) -> list[float] | None:
        """The objectives of a feasible trial, all minimized; None of any other."""
        if row.summary is None or not row.summary.feasible:
            return None
        values = [o.sign * row.summary.metrics.get(o.metric, math.nan) for o in self.objectives]
        return values if all(map(math.isfinite, values)) else None

    def _kept(self, rows: Iterable[Row]) -> list[tuple[Row, list[float]]]:
        return [(row, point) for row in rows if (point := self.point(row)) is not None]

    def _archive(self, rows: Sequence[Row]) -> Archive | None:
        """Empty, up to the worst that counts; None while no trial is feasible."""
        first = next((point for row in _ended(rows) if (point := self.point(row)) is not None), None)
        if first is None:
            return None
        known = bounds(rows)
        bound = {limit.metric: known.get(limit.metric, limit.absolute) for limit in self.limits}
        return Archive([_worst(o, bound.get(o.metric), x) for o, x in zip(self.objectives, first, strict=True)])

    def _costs(self, point: Sequence[float]) -> list[float]:
        return [_cost(o, o.sign * x) for o, x in zip(self.objectives, point, strict=True)]


def _worst(objective: Objective, bound: float | None, first: float) -> float:
    """The cost from which on a value counts for nothing; `first` is as in a point."""
    if bound:
        return _cost(objective, bound)
    twice = 2 * _cost(objective, objective.sign * first)
    return twice if 0 < twice < math.inf else 1.0


def _cost(objective: Objective, value: float) -> float:
    """A metric's value such that 0 is the best that can be: of what is maximized the reciprocal."""
    if objective.direction == "minimize":
        return value
    return 1 / value if value > 0 else math.inf


def _ended(rows: Iterable[Row]) -> list[Row]:
    """The evaluated trials in the order in which they ended."""
    return sorted((r for r in rows if r.state in EVALUATED), key=lambda r: (r.ended_s or 0.0, r.number))


def spent_s(rows: Iterable[Row]) -> float:
    """Seconds of all trials together, whoever evaluated them."""
    return sum(row.summary.spent_s for row in rows if row.summary is not None)


def spent_j(rows: Iterable[Row]) -> float:
    """Joules of all trials together."""
    return sum(row.summary.energy_j for row in rows if row.summary is not None)


def begun(rows: Iterable[Row]) -> int:
    """How many trials have or will have cost work."""
    return sum(1 for row in rows if row.state != "refused")


def bounds(rows: Iterable[Row]) -> dict[str, float]:
    """The limits in their metrics' units as trials were judged by them, those relative to the baseline too."""
    held = (item for row in rows if row.summary is not None for item in row.summary.verdicts.items())
    return {metric: verdict.bound for metric, verdict in held if verdict.bound is not None}
