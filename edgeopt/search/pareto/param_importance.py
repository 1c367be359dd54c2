"""How much each parameter decides: the share of a metric's spread that goes with its choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

BINS = 4
"""Groups that a parameter of many numbers is cut into, of equal size."""


def importance(params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """Parameter → ε² of the values grouped by it, from 0 to 1, the largest first; each parameter taken alone.

    ε² is the share of variance between groups, without what chance alone would put there (Kelley, 1935,
    doi:10.1073/pnas.21.9.554). A trial in which a parameter was not asked for is a group of its own.

    Args:
        params, values: of the same trials, in the same order; values are finite.
    """
    names = sorted({name for chosen in params for name in chosen})
    found = {name: _epsilon_squared(_groups([chosen.get(name) for chosen in params]), values) for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _groups(choices: Sequence[Any]) -> list[str]:
    """A label for each choice: itself, or the quarter in which a number lies where there are many."""
    numbers = sorted(c for c in choices if isinstance(c, (int, float)) and not isinstance(c, bool))
    if len(set(numbers)) <= BINS + 2:
        return [repr(choice) for choice in choices]
    edges = [numbers[len(numbers) * k // BINS] for k in range(1, BINS)]
    return [
        f"quarter {sum(1 for edge in edges if choice >= edge)}" if choice in numbers else repr(choice)
        for choice in choices
    ]


def _epsilon_squared(groups: Sequence[str], values: Sequence[float]) -> float:
    count, kinds = len(values), len(set(groups))
    if kinds < 2 or count <= kinds:
        return 0.0
    mean = math.fsum(values) / count
    total = math.fsum((value - mean) ** 2 for value in values)
    if total == 0:
        return 0.0
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    within = math.fsum((v - math.fsum(m) / len(m)) ** 2 for m in members.values() for v in m)
    return max(0.0, 1 - within / total * (count - 1) / (count - kinds))
