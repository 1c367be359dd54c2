"""Compare measurements with limits. A missing or noisy measurement never satisfies a limit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from edgeopt.core import units
from edgeopt.core.result import Measurement, Verdict
from edgeopt.core.target import Limit


def judge(
    measurements: Iterable[Measurement], limits: Iterable[Limit], baseline: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """Return one verdict for each limit, in order.

    A limit is satisfied if the worse end of the confidence interval is within the limit and the measurement is not
    noisy. The worse end is the upper one for an upper limit and the lower one for a lower limit.

    Args:
        measurements: metrics of the engine.
        limits: limits to compare with.
        baseline: values of the uncompressed model by metric, for relative limits.
    """
    by_metric = {m.metric: m for m in measurements}
    baseline = {metric: value for metric, value in baseline.items() if math.isfinite(value)}
    return tuple(
        _verdict(limit, by_metric.get(limit.metric), limit.bound(baseline.get(limit.metric))) for limit in limits
    )


def _verdict(limit: Limit, measurement: Measurement | None, bound: float | None) -> Verdict:
    excess, reason = _excess_and_reason(limit, measurement, bound)
    return Verdict(
        metric=limit.metric,
        limit=str(limit),
        bound=bound,
        value=None if measurement is None else measurement.value,
        excess=excess,
        satisfied=reason == "",
        reason=reason,
    )


def _excess_and_reason(limit: Limit, measurement: Measurement | None, bound: float | None) -> tuple[float | None, str]:
    """Return the excess and the reason why the limit is not satisfied, "" if it is."""
    if measurement is None:
        return None, "not measured"
    if bound is None:
        return None, "the baseline of this relative limit was not measured"
    if limit.is_minimum:
        worse, better, side = measurement.low, measurement.high, "below"
    else:
        worse, better, side = measurement.high, measurement.low, "above"
    # If even the better end violates the limit, it proves the violation; otherwise the worse end decides.
    end = better if _excess(better, bound, limit.is_minimum) > 0 else worse
    direction = "down" if (end == worse) == limit.is_minimum else "up"
    value = units.format_quantity(measurement.value, limit.unit)
    is_exact = measurement.low == measurement.high
    found = value if is_exact else f"{value}, interval {direction} to {units.format_quantity(end, limit.unit)},"
    if not (math.isfinite(measurement.value) and math.isfinite(worse)):
        return None, f"{found} is not finite"
    excess = _excess(worse, bound, limit.is_minimum)
    if excess > 0:
        return excess, f"{found} is {side} {units.format_quantity(bound, limit.unit)}"
    if measurement.noisy:
        return excess, f"{found} is within the limit, but other processes disturbed the measurement"
    return excess, ""


def _excess(worse: float, bound: float, is_minimum: bool) -> float:
    """Return the relative distance by which `worse` violates `bound`, negative if it is within."""
    if bound == 0:  # A multiple of a zero baseline: only zero satisfies it, and every excess counts as 100 %.
        return 0.0 if is_minimum or worse <= 0 else 1.0
    return 1.0 - worse / bound if is_minimum else worse / bound - 1.0
