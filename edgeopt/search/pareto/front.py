"""Sort points by Pareto dominance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeopt.core.target import require_known_metric
from edgeopt.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A metric to minimize or maximize."""

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def sign(self) -> float:
        """Return the factor that turns the metric into a value to minimize."""
        return 1.0 if self.direction == "minimize" else -1.0

    @classmethod
    def parse(cls, metric: str, direction: str, known: Mapping[str, str]) -> Objective:
        """Build an objective from its config entry; `known` has all metrics.

        Raises ConfigError if the metric is unknown or the direction is invalid.
        """
        location = f"search.objectives.{metric}"
        require_known_metric(metric, known, location)
        if direction not in ("minimize", "maximize"):
            raise ConfigError(f"the direction must be minimize or maximize, got {direction!r}", location=location)
        return cls(metric=metric, direction="minimize" if direction == "minimize" else "maximize")


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return True if `a` is at most `b` in every objective and less in at least one."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def pareto_ranks(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the Pareto rank of each point: 1 on the front, 2 on the front of the rest, and so on.

    All objectives are minimized. This is the non-dominated sorting of NSGA-II (Deb et al., 2002,
    doi:10.1109/4235.996017).
    """
    ranks, rank = [0] * len(points), 0
    unranked = list(range(len(points)))
    while unranked:
        rank += 1
        for index in pareto_front([points[n] for n in unranked]):
            ranks[unranked[index]] = rank
        unranked = [n for n in unranked if ranks[n] == 0]
    return ranks


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other point dominates. All objectives are minimized.

    In lexicographic order a later point never dominates an earlier one, so the first remaining point is on the front.
    """
    import numpy as np

    if not points:
        return []
    values = np.asarray(points, dtype=float)
    remaining, front = np.lexsort(values.T[::-1]), []
    while remaining.size:
        first, others = values[remaining[0]], values[remaining]
        front.append(int(remaining[0]))
        dominated = (others >= first).all(axis=1) & (others > first).any(axis=1)
        remaining = remaining[~dominated][1:]
    return sorted(front)
