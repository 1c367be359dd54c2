"""When to stop an evaluation: even the best that is possible by what is known so far breaks a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeopt.core import units
from edgeopt.core.judge import judge
from edgeopt.core.result import Measurement, Verdict
from edgeopt.core.target import Limit


def early_stop_verdicts(
    figures: Sequence[Measurement], limits: Sequence[Limit], baseline: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """Verdicts of all limits where one of them is broken even if all is as good as intervals allow; else none.

    Of two figures of one metric the later counts, so that `figures` gives what was predicted before what was
    measured. What is noisy breaks no limit here. A verdict is on what was measured, else on the best that was
    predicted, else on nothing.
    """
    known = {m.metric: m for m in figures}
    from_below = {limit.metric for limit in limits if limit.is_minimum}
    hoped = [_at(m, m.high if m.metric in from_below else m.low) for m in known.values() if not m.noisy]
    at_best = judge(hoped, limits, baseline)
    if not any(v.excess is not None and v.excess > 0 for v in at_best):
        return ()
    predicted = {m.metric: m.unit for m in known.values() if m.kind == "predicted"}
    found = judge([m for m in known.values() if m.metric not in predicted], limits, baseline)
    return tuple(
        _predicted(hope, predicted[hope.metric]) if hope.metric in predicted else verdict
        for hope, verdict in zip(at_best, found, strict=True)
    )


def _at(figure: Measurement, value: float) -> Measurement:
    return replace(figure, value=value, low=value, high=value)


def _predicted(verdict: Verdict, unit: str) -> Verdict:
    if verdict.excess is None or verdict.excess <= 0:
        return replace(verdict, predicted=True)
    value, bound = (units.show(number or 0.0, unit) for number in (verdict.value, verdict.bound))
    return replace(verdict, predicted=True, reason=f"is predicted to be {value} at best, beyond {bound}")
