"""Which member of a front comes first: metrics scaled over the front and weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """`weight` is what the whole spread of `metric` over the front counts."""

    metric: str
    direction: Literal["minimize", "maximize"]
    weight: float


def scores(rows: Sequence[Mapping[str, Any]], criteria: Sequence[Criterion]) -> dict[int, float]:
    """Trial number → Σ weight · (value − best) / (worst − best); 0 is best in everything.

    A metric in which all members are equal counts nothing. Every row must have every metric.
    """
    found = {row["number"]: 0.0 for row in rows}
    for criterion in criteria:
        sign = 1.0 if criterion.direction == "minimize" else -1.0
        values = {row["number"]: sign * row["metrics"][criterion.metric] for row in rows}
        best, spread = min(values.values()), max(values.values()) - min(values.values())
        if spread > 0:
            for number, value in values.items():
                found[number] += criterion.weight * (value - best) / spread
    return found


def first(rows: Sequence[Mapping[str, Any]], criteria: Sequence[Criterion]) -> int:
    """The trial with the lowest score; the earlier one where two are equal."""
    ranked = scores(rows, criteria)
    return min(ranked, key=lambda number: (ranked[number], number))
