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
    found = judge([measurement] if measurement else [], [limit], {} if baseline is None else {METRIC: baseline})
    assert len(found) == 1
    return found[0]


@given(value=st.floats(0.001, 1e4), width=st.floats(0, 1e3), bound=st.floats(0.001, 1e4))
def test_a_limit_is_kept_where_the_whole_interval_lies_within(value: float, width: float, bound: float) -> None:
    found = verdict(measured(value, value + width), Limit(metric=METRIC, unit="ms", absolute=bound))
    assert found.excess == pytest.approx((value + width) / bound - 1)
    assert found.satisfied == (found.excess <= 0)
    assert bool(found.reason) != found.satisfied


@given(value=st.floats(0.001, 1e4), width=st.floats(0, 1e3), bound=st.floats(0.001, 1e4))
def test_a_limit_from_below_is_kept_where_the_whole_interval_lies_above(
    value: float, width: float, bound: float
) -> None:
    figure = replace(measured(value), low=value - width)
    found = verdict(figure, Limit(metric=METRIC, unit="ms", absolute=bound, is_minimum=True))
    assert found.excess == pytest.approx(1 - (value - width) / bound)
    assert found.satisfied == (value - width >= bound)
    assert found.satisfied or "below" in found.reason


def test_a_limit_from_below_may_refer_to_the_baseline() -> None:
    nine_tenths = Limit(metric=METRIC, unit="ms", baseline_factor=0.9, is_minimum=True)
    assert verdict(measured(95.0), nine_tenths, baseline=100.0).satisfied
    assert not verdict(measured(85.0), nine_tenths, baseline=100.0).satisfied
    assert verdict(measured(0.0), nine_tenths, baseline=0.0).satisfied


def test_a_figure_within_whose_interval_reaches_above_is_not_proven() -> None:
    found = verdict(measured(99.0, 101.0))
    assert not found.satisfied
    assert "99 ms, interval up to 101 ms, is above 100 ms" in found.reason


def test_the_limit_itself_is_kept() -> None:
    assert verdict(measured(100.0)).satisfied


def test_what_was_not_measured_is_never_kept() -> None:
    found = verdict(None)
    assert (found.satisfied, found.value, found.excess) == (False, None, None)
    assert "not measured" in found.reason


def test_a_disturbed_figure_proves_nothing() -> None:
    found = verdict(measured(50.0, noisy=True))
    assert not found.satisfied
    assert "disturbed" in found.reason


def test_a_disturbed_figure_above_is_told_as_above() -> None:
    assert "above" in verdict(measured(150.0, noisy=True)).reason


def test_a_relative_limit_is_held_against_the_baseline() -> None:
    assert verdict(measured(49.0), HALF, baseline=100.0).satisfied
    assert not verdict(measured(51.0), HALF, baseline=100.0).satisfied


def test_a_relative_limit_without_its_baseline_is_not_kept() -> None:
    found = verdict(measured(1.0), HALF)
    assert (found.satisfied, found.bound, found.excess) == (False, None, None)
    assert "baseline" in found.reason


@pytest.mark.parametrize(("value", "kept"), [(0.0, True), (0.001, False)])
def test_a_baseline_of_zero_is_a_limit_like_another(value: float, kept: bool) -> None:
    found = verdict(measured(value), HALF, baseline=0.0)
    assert found.satisfied is kept
    assert found.excess is not None
    assert math.isfinite(found.excess)
    assert (found.excess <= 0) is kept


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_never_kept(value: float) -> None:
    for found in (
        verdict(measured(value)),
        verdict(measured(1.0, value)),
        verdict(measured(value), HALF, baseline=2.0),
    ):
        assert not found.satisfied
        json.dumps(asdict(found) | {"value": None}, allow_nan=False)


@pytest.mark.parametrize("baseline", [math.nan, math.inf])
def test_a_baseline_that_is_no_number_proves_nothing(baseline: float) -> None:
    assert not verdict(measured(1.0), HALF, baseline=baseline).satisfied


def test_limits_keep_their_order_and_every_one_gets_a_verdict() -> None:
    other = Limit(metric="size/engine_mib", unit="MiB", absolute=1.0)
    assert [v.metric for v in judge([measured(1.0)], [other, AT_MOST_100], {})] == [other.metric, METRIC]


def test_a_trial_is_feasible_only_where_something_was_measured_and_all_is_kept() -> None:
    blank: dict[str, Any] = {"recipe": {}, "target": "t", "device": {}, "emulated": False}
    good, bad = verdict(measured(1.0)), verdict(measured(101.0))
    assert TrialResult(**blank, measurements=(measured(1.0),), verdicts=(good,)).feasible
    assert not TrialResult(**blank, measurements=(measured(1.0),), verdicts=(good, bad)).feasible
    assert not TrialResult(**blank).feasible
