"""Measurements held against limits: pure arithmetic, where missing and noisy are never good."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from edgeopt import units
from edgeopt.result import Measurement, Verdict
from edgeopt.target import Limit


def judge(
    measurements: Iterable[Measurement], limits: Iterable[Limit], baseline: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """One verdict a limit.

    A limit is kept where the upper end of the figure's confidence interval lies within it and the
    figure is not noisy. `baseline` maps metrics to the uncompressed model's values.
    """
    measured = {m.metric: m for m in measurements}
    baseline = {metric: value for metric, value in baseline.items() if math.isfinite(value)}
    return tuple(
        _verdict(limit, measured.get(limit.metric), limit.bound(baseline.get(limit.metric))) for limit in limits
    )


def _verdict(limit: Limit, found: Measurement | None, bound: float | None) -> Verdict:
    excess = None
    if found is None:
        reason = "it was not measured"
    elif bound is None:
        reason = "the baseline that it refers to was not measured"
    elif not (math.isfinite(found.value) and math.isfinite(found.high)):
        reason = (
            f"{units.show(found.value, limit.unit)}, interval up to {units.show(found.high, limit.unit)}, is no number"
        )
    else:
        excess = _excess(found.high, bound)
        shown = f"{units.show(found.value, limit.unit)}, interval up to {units.show(found.high, limit.unit)}"
        if excess > 0:
            reason = f"{shown}, is above {units.show(bound, limit.unit)}"
        elif found.noisy:
            reason = f"{shown}, is within the limit but was disturbed by other processes"
        else:
            reason = ""
    return Verdict(
        metric=limit.metric,
        limit=str(limit),
        bound=bound,
        value=None if found is None else found.value,
        excess=excess,
        kept=reason == "",
        reason=reason,
    )


def _excess(high: float, bound: float) -> float:
    if bound == 0:  # a multiple of a baseline of zero: kept by zero, and any more is as bad as twice a limit
        return 0.0 if high <= 0 else 1.0
    return high / bound - 1.0
