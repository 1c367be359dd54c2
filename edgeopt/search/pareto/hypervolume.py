"""How good a front is in one number: the volume that it dominates up to a reference point."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

Point = Sequence[float]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume that `points`, all minimized, dominate below `reference`.

    By slices along the last objective (Zitzler and Thiele, 1998, doi:10.1007/BFb0056872); two objectives are swept.
    """
    inside = sorted((p for p in points if all(x < r for x, r in zip(p, reference, strict=True))), key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    if len(reference) == 2:
        return _area(inside, reference)
    volume = 0.0
    ends = [*(p[-1] for p in inside[1:]), reference[-1]]
    for count, (point, end) in enumerate(zip(inside, ends, strict=True), start=1):
        if end > point[-1]:
            volume += (end - point[-1]) * hypervolume([p[:-1] for p in inside[:count]], reference[:-1])
    return volume


def _area(rising: Sequence[Point], reference: Point) -> float:
    """Of points whose second value rises."""
    area, left = 0.0, reference[0]
    for x, y in rising:
        if x < left:
            area += (left - x) * (reference[1] - y)
            left = x
    return area


class Archive:
    """Points that arrive one by one, and how the volume that they dominate grows.

    Each objective counts as a share of `reference`, the worst value that counts: the volume is that share of the box
    between zero and the reference, and a point that comes later never changes what an earlier one was worth.
    """

    def __init__(self, reference: Point) -> None:
        self._reference = reference
        self._front: list[Point] = []
        self.volume = 0.0

    def add(self, point: Point) -> float:
        """The volume after `point`, between 0 and 1."""
        point_inside = [max(0.0, x / worst) for x, worst in zip(point, self._reference, strict=True)]
        if not any(all(x <= y for x, y in zip(p, point_inside, strict=True)) for p in self._front):
            self._front = [p for p in self._front if not all(x <= y for x, y in zip(point_inside, p, strict=True))]
            self._front.append(point_inside)
            self.volume = hypervolume(self._front, [1.0] * len(point_inside))
        return self.volume


def without_growth(volumes: Sequence[float], by: float = 1e-3) -> int:
    """How many of the last volumes did not exceed the one before them by the share `by`."""
    if not volumes:
        return 0
    return len(volumes) - 1 - bisect_left(volumes, volumes[-1] / (1 + by))
