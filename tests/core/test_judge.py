from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.judge import judge
from edgeopt.core.result import Measurement, TrialResult, Verdict
from edgeopt.core.target import Limit

METRIC = "latency/decode_p50_ms"
AT_MOST_100 = Limit(metric=METRIC, unit="ms", absolute=100.0)
HALF = Limit(metric=METRIC, unit="ms", baseline_factor=0.5)


def measured(value: float, high: float | None = None, **more: Any) -> Measurement:
    high = value if high is None else high
    return Measurement(metric=METRIC, unit="ms", value=value, low=value, high=high, count=5, method="clock", **more)


def verdict(measurement: Measurement | None, limit: Limit = AT_MOST_100, baseline: float | None = None) -> Verdict:
    result = judge([measurement] if measurement else [], [limit], {} if baseline is None else {METRIC: baseline})
    assert len(result) == 1
    return result[0]


@given(value=st.floats(0.001, 1e4), width=st.floats(0, 1e3), bound=st.floats(0.001, 1e4))
def test_upper_limit_needs_whole_interval_within(value: float, width: float, bound: float) -> None:
    result = verdict(measured(value, value + width), Limit(metric=METRIC, unit="ms", absolute=bound))
    assert result.excess == pytest.approx((value + width) / bound - 1)
    assert result.satisfied == (result.excess <= 0)
    assert bool(result.reason) != result.satisfied


@given(value=st.floats(0.001, 1e4), width=st.floats(0, 1e3), bound=st.floats(0.001, 1e4))
def test_lower_limit_needs_whole_interval_within(value: float, width: float, bound: float) -> None:
    measurement = replace(measured(value), low=value - width)
    result = verdict(measurement, Limit(metric=METRIC, unit="ms", absolute=bound, is_minimum=True))
    assert result.excess == pytest.approx(1 - (value - width) / bound)
    assert result.satisfied == (value - width >= bound)
    assert result.satisfied or "below" in result.reason


def test_lower_limit_may_be_relative() -> None:
    nine_tenths = Limit(metric=METRIC, unit="ms", baseline_factor=0.9, is_minimum=True)
    assert verdict(measured(95.0), nine_tenths, baseline=100.0).satisfied
    assert not verdict(measured(85.0), nine_tenths, baseline=100.0).satisfied
    assert verdict(measured(0.0), nine_tenths, baseline=0.0).satisfied


def test_interval_above_limit_is_a_violation() -> None:
    result = verdict(measured(99.0, 101.0))
    assert not result.satisfied
    assert "99 ms, interval up to 101 ms, is above 100 ms" in result.reason


@pytest.mark.parametrize(
    ("low", "value", "high", "is_minimum", "expected"),
    [
        (120.0, 130.0, 150.0, False, "130 ms, interval down to 120 ms, is above 100 ms"),
        (90.0, 95.0, 101.0, False, "95 ms, interval up to 101 ms, is above 100 ms"),
        (70.0, 80.0, 90.0, True, "80 ms, interval up to 90 ms, is below 100 ms"),
        (99.0, 105.0, 110.0, True, "105 ms, interval down to 99 ms, is below 100 ms"),
        (105.0, 105.0, 105.0, False, "105 ms is above 100 ms"),
    ],
)
def test_violation_quotes_the_deciding_interval_end(
    low: float, value: float, high: float, is_minimum: bool, expected: str
) -> None:
    limit = replace(AT_MOST_100, is_minimum=is_minimum)
    assert expected in verdict(replace(measured(value, high), low=low), limit).reason


def test_value_equal_to_limit_satisfies_it() -> None:
    assert verdict(measured(100.0)).satisfied


def test_missing_measurement_never_satisfies_limit() -> None:
    result = verdict(None)
    assert (result.satisfied, result.value, result.excess) == (False, None, None)
    assert "not measured" in result.reason


def test_noisy_measurement_never_satisfies_limit() -> None:
    result = verdict(measured(50.0, noisy=True))
    assert not result.satisfied
    assert "disturbed" in result.reason


def test_noisy_violation_is_reported_as_violation() -> None:
    assert "above" in verdict(measured(150.0, noisy=True)).reason


def test_relative_limit_scales_the_baseline() -> None:
    assert verdict(measured(49.0), HALF, baseline=100.0).satisfied
    assert not verdict(measured(51.0), HALF, baseline=100.0).satisfied


def test_relative_limit_needs_its_baseline() -> None:
    result = verdict(measured(1.0), HALF)
    assert (result.satisfied, result.bound, result.excess) == (False, None, None)
    assert "baseline" in result.reason


@pytest.mark.parametrize(("value", "satisfied"), [(0.0, True), (0.001, False)])
def test_zero_baseline_has_finite_excess(value: float, satisfied: bool) -> None:
    result = verdict(measured(value), HALF, baseline=0.0)
    assert result.satisfied is satisfied
    assert result.excess is not None
    assert math.isfinite(result.excess)
    assert (result.excess <= 0) is satisfied


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_measurement_never_satisfies_limit(value: float) -> None:
    for result in (
        verdict(measured(value)),
        verdict(measured(1.0, value)),
        verdict(measured(value), HALF, baseline=2.0),
    ):
        assert not result.satisfied
        json.dumps(asdict(result) | {"value": None}, allow_nan=False)


@pytest.mark.parametrize("baseline", [math.nan, math.inf])
def test_non_finite_baseline_never_satisfies_limit(baseline: float) -> None:
    assert not verdict(measured(1.0), HALF, baseline=baseline).satisfied


def test_every_limit_gets_a_verdict_in_order() -> None:
    other = Limit(metric="size/engine_mib", unit="MiB", absolute=1.0)
    assert [v.metric for v in judge([measured(1.0)], [other, AT_MOST_100], {})] == [other.metric, METRIC]


def test_feasible_trial_satisfies_every_limit() -> None:
    blank: dict[str, Any] = {"recipe": {}, "target": "t", "device": {}, "emulated": False}
    good, bad = verdict(measured(1.0)), verdict(measured(101.0))
    assert TrialResult(**blank, measurements=(measured(1.0),), verdicts=(good,)).feasible
    assert not TrialResult(**blank, measurements=(measured(1.0),), verdicts=(good, bad)).feasible
    assert not TrialResult(**blank).feasible
