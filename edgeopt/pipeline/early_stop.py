"""Stop an evaluation early if a limit is certainly violated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeopt.core import units
from edgeopt.core.judge import judge
from edgeopt.core.result import Measurement, Verdict
from edgeopt.core.target import Limit


def early_stop_verdicts(
    measurements: Sequence[Measurement], limits: Sequence[Limit], baseline: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """Return the verdicts on all limits if at least one is certainly violated, else ().

    A limit is certainly violated if the better end of the metric's interval violates it. A noisy measurement never
    proves a violation. Each verdict judges the measurement of its metric or, without one, the better end of the
    prediction.

    Args:
        measurements: predictions, then measurements. A later entry replaces earlier ones of the same metric.
        limits: limits to compare with.
        baseline: values of the uncompressed model by metric.
    """
    latest = {m.metric: m for m in measurements}
    lower_limited = {limit.metric for limit in limits if limit.is_minimum}
    best = [_as_exact(m, m.high if m.metric in lower_limited else m.low) for m in latest.values() if not m.noisy]
    best_verdicts = judge(best, limits, baseline)
    if not any(v.excess is not None and v.excess > 0 for v in best_verdicts):
        return ()
    predicted_units = {m.metric: m.unit for m in latest.values() if m.kind == "predicted"}
    measured_verdicts = judge([m for m in latest.values() if m.metric not in predicted_units], limits, baseline)
    return tuple(
        _mark_predicted(at_best, predicted_units[at_best.metric]) if at_best.metric in predicted_units else measured
        for at_best, measured in zip(best_verdicts, measured_verdicts, strict=True)
    )


def _as_exact(measurement: Measurement, value: float) -> Measurement:
    """Return the measurement with its interval reduced to `value`."""
    return replace(measurement, value=value, low=value, high=value)


def _mark_predicted(verdict: Verdict, unit: str) -> Verdict:
    """Return the verdict marked as that of a prediction, with a reason that says so if the limit is violated."""
    if verdict.excess is None or verdict.excess <= 0:
        return replace(verdict, predicted=True)
    value, bound = (units.format_quantity(number or 0.0, unit) for number in (verdict.value, verdict.bound))
    return replace(verdict, predicted=True, reason=f"is predicted to be {value} at best, beyond {bound}")
