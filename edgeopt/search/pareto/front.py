"""Who is best: non-dominated sorting of the trials in which every limit was measured and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeopt.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A metric to minimize or maximize."""

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def sign(self) -> float:
        return 1.0 if self.direction == "minimize" else -1.0

    @classmethod
    def parse(cls, metric: str, direction: str, known: Mapping[str, str]) -> Objective:
        location = f"search.objectives.{metric}"
        if metric not in known:
            raise ConfigError(
                f"unknown metric {metric!r}", location=location, hint=f"Choose one of: {', '.join(sorted(known))}"
            )
        if direction not in ("minimize", "maximize"):
            raise ConfigError(f"{direction!r} is no direction", location=location, hint="Give minimize or maximize")
        return cls(metric=metric, direction="minimize" if direction == "minimize" else "maximize")


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere larger than `b` and somewhere smaller."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def pareto_ranks(points: Sequence[Sequence[float]]) -> list[int]:
    """1 for points that none dominates, 2 for those that only rank 1 dominates, and so on; all minimized.

    Non-dominated sorting of NSGA-II (Deb et al., 2002, doi:10.1109/4235.996017).
    """
    ranks, rank = [0] * len(points), 0
    left = list(range(len(points)))
    while left:
        rank += 1
        for index in pareto_front([points[n] for n in left]):
            ranks[left[index]] = rank
        left = [n for n in left if ranks[n] == 0]
    return ranks


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """The places of the points that none dominates; all minimized.

    In lexicographic order no point is dominated by a later one, so the first of those that are left is on the front.
    """
    import numpy as np

    if not points:
        return []
    values = np.asarray(points, dtype=float)
    pool, front = np.lexsort(values.T[::-1]), []
    while pool.size:
        first, others = values[pool[0]], values[pool]
        front.append(int(pool[0]))
        dominated = (others >= first).all(axis=1) & (others > first).any(axis=1)
        pool = pool[~dominated][1:]
    return sorted(front)
