"""Compute how strongly each searched parameter influences a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

BINS = 4
"""Number of groups of equal size for a parameter with many numeric values."""


def compute_importance(params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """Return the importance of each parameter, from 0 to 1, the largest first.

    The importance is ε² of the values grouped by the parameter alone: the share of variance between groups, corrected
    for the share expected by chance (Kelley, 1935, doi:10.1073/pnas.21.9.554). Trials in which the parameter is
    inactive form a group of their own.

    Args:
        params: parameters of each trial.
        values: finite value of the metric in the same trials, in the same order.
    """
    names = sorted({name for chosen in params for name in chosen})
    importance = {name: _epsilon_squared(_groups([chosen.get(name) for chosen in params]), values) for name in names}
    return dict(sorted(importance.items(), key=lambda item: -item[1]))


def _groups(choices: Sequence[Any]) -> list[str]:
    """Return a group label for each choice: the choice itself, or the quarter of many numbers that contains it."""
    numbers = sorted(c for c in choices if isinstance(c, (int, float)) and not isinstance(c, bool))
    if len(set(numbers)) <= BINS + 2:
        return [repr(choice) for choice in choices]
    edges = [numbers[len(numbers) * k // BINS] for k in range(1, BINS)]
    return [
        f"quarter {sum(1 for edge in edges if choice >= edge)}" if choice in numbers else repr(choice)
        for choice in choices
    ]


def _epsilon_squared(groups: Sequence[str], values: Sequence[float]) -> float:
    count, group_count = len(values), len(set(groups))
    if group_count < 2 or count <= group_count:
        return 0.0
    mean = math.fsum(values) / count
    total = math.fsum((value - mean) ** 2 for value in values)
    if total == 0:
        return 0.0
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    within = math.fsum((v - math.fsum(m) / len(m)) ** 2 for m in members.values() for v in m)
    return max(0.0, 1 - within / total * (count - 1) / (count - group_count))
