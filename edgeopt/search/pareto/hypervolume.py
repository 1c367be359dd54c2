"""Measure a Pareto front by its hypervolume: the volume that it dominates up to a reference point."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

Point = Sequence[float]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the volume that `points` dominate below `reference`. All objectives are minimized.

    The volume is computed by slices along the last objective (Zitzler and Thiele, 1998, doi:10.1007/BFb0056872), and
    by a sweep for two objectives.
    """
    inside = sorted((p for p in points if all(x < r for x, r in zip(p, reference, strict=True))), key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    if len(reference) == 2:
        return _dominated_area(inside, reference)
    volume = 0.0
    slice_ends = [*(p[-1] for p in inside[1:]), reference[-1]]
    for count, (point, end) in enumerate(zip(inside, slice_ends, strict=True), start=1):
        if end > point[-1]:
            volume += (end - point[-1]) * hypervolume([p[:-1] for p in inside[:count]], reference[:-1])
    return volume


def _dominated_area(points: Sequence[Point], reference: Point) -> float:
    """Return the area that two-dimensional points, sorted by the second objective, dominate."""
    area, min_x = 0.0, reference[0]
    for x, y in points:
        if x < min_x:
            area += (min_x - x) * (reference[1] - y)
            min_x = x
    return area


class HypervolumeTracker:
    """Hypervolume of a growing set of points.

    Objectives are divided by `reference`, and negative values count as 0. The hypervolume is therefore the share of
    the box between zero and the reference. It never decreases, and later points do not change earlier values.

    Args:
        reference: worst value of each objective that still contributes.
    """

    def __init__(self, reference: Point) -> None:
        self._reference = reference
        self._front: list[Point] = []
        self.volume = 0.0

    def add(self, point: Point) -> float:
        """Add a point and return the hypervolume, between 0 and 1."""
        scaled = [max(0.0, x / worst) for x, worst in zip(point, self._reference, strict=True)]
        if not any(all(x <= y for x, y in zip(p, scaled, strict=True)) for p in self._front):
            self._front = [p for p in self._front if not all(x <= y for x, y in zip(scaled, p, strict=True))]
            self._front.append(scaled)
            self.volume = hypervolume(self._front, [1.0] * len(scaled))
        return self.volume


def trials_without_growth(volumes: Sequence[float], min_growth: float = 1e-3) -> int:
    """Return the number of last volumes that exceed the volume before them by less than the share `min_growth`.

    Args:
        volumes: hypervolume after each trial; it never decreases.
    """
    if not volumes:
        return 0
    return len(volumes) - 1 - bisect_left(volumes, volumes[-1] / (1 + min_growth))
