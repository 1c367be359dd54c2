"""Measurements held against limits: pure arithmetic, where missing and noisy are never good."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from edgeopt.core import units
from edgeopt.core.result import Measurement, Verdict
from edgeopt.core.target import Limit


def judge(
    measurements: Iterable[Measurement], limits: Iterable[Limit], baseline: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """One verdict a limit.

    A limit is kept where the worse end of the figure's confidence interval lies within it (the upper
    end, or the lower one of a limit from below) and the figure is not noisy. `baseline` maps metrics
    to the uncompressed model's values.
    """
    measured = {m.metric: m for m in measurements}
    baseline = {metric: value for metric, value in baseline.items() if math.isfinite(value)}
    return tuple(
        _verdict(limit, measured.get(limit.metric), limit.bound(baseline.get(limit.metric))) for limit in limits
    )


def _verdict(limit: Limit, found: Measurement | None, bound: float | None) -> Verdict:
    excess, reason = _judged(limit, found, bound)
    return Verdict(
        metric=limit.metric,
        limit=str(limit),
        bound=bound,
        value=None if found is None else found.value,
        excess=excess,
        satisfied=reason == "",
        reason=reason,
    )


def _judged(limit: Limit, found: Measurement | None, bound: float | None) -> tuple[float | None, str]:
    """(excess, why the limit is not kept)."""
    if found is None:
        return None, "it was not measured"
    if bound is None:
        return None, "the baseline that it refers to was not measured"
    worse, way, side = (found.low, "down", "below") if limit.is_minimum else (found.high, "up", "above")
    shown = f"{units.show(found.value, limit.unit)}, interval {way} to {units.show(worse, limit.unit)}"
    if not (math.isfinite(found.value) and math.isfinite(worse)):
        return None, f"{shown}, is no number"
    excess = _excess(worse, bound, limit.is_minimum)
    if excess > 0:
        return excess, f"{shown}, is {side} {units.show(bound, limit.unit)}"
    if found.noisy:
        return excess, f"{shown}, is within the limit but was disturbed by other processes"
    return excess, ""


def _excess(worse: float, bound: float, is_minimum: bool) -> float:
    if bound == 0:  # a multiple of a baseline of zero: kept by zero, and any more is as bad as twice a limit
        return 0.0 if is_minimum or worse <= 0 else 1.0
    return 1.0 - worse / bound if is_minimum else worse / bound - 1.0
