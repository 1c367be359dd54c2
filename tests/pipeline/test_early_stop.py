"""Check that a recipe is stopped only if even the better end of an interval violates a limit."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.judge import judge
from edgeopt.core.result import Measurement, TrialResult
from edgeopt.core.target import Limit
from edgeopt.pipeline.early_stop import early_stop_verdicts

SIZE, THROUGHPUT, PERPLEXITY = "size/engine_mib", "throughput/decode_tokens_per_s", "quality/perplexity"
POSITIVE = st.floats(0.01, 1e6)


def predicted(metric: str, low: float, value: float, high: float) -> Measurement:
    return Measurement(
        metric=metric, unit="MiB", value=value, low=low, high=high, count=0, method="arithmetic", kind="predicted"
    )


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE)
def test_prediction_stops_only_beyond_its_best_end(ends: list[float], bound: float) -> None:
    low, value, high = ends
    upper_limit = early_stop_verdicts(
        [predicted(SIZE, low, value, high)], [Limit(metric=SIZE, unit="MiB", absolute=bound)], {}
    )
    assert bool(upper_limit) == (low / bound - 1 > 0)
    minimum = Limit(metric=THROUGHPUT, unit="MiB", absolute=bound, is_minimum=True)
    assert bool(early_stop_verdicts([predicted(THROUGHPUT, low, value, high)], [minimum], {})) == (1 - high / bound > 0)


def test_verdicts_cover_all_limits_and_mark_predictions() -> None:
    limits = [Limit(metric=SIZE, unit="MiB", absolute=5.0), Limit(metric=PERPLEXITY, unit="", absolute=20.0)]
    size, loss = early_stop_verdicts([predicted(SIZE, 9.0, 10.0, 11.0)], limits, {})
    assert (size.predicted, size.satisfied, size.value, size.excess) == (True, False, 9.0, 0.8)
    assert size.reason == "is predicted to be 9 MiB at best, beyond 5 MiB"
    assert (loss.predicted, loss.satisfied, loss.excess) == (False, False, None)


def test_unknown_baseline_does_not_stop() -> None:
    limit = Limit(metric=SIZE, unit="MiB", baseline_factor=0.5)
    predictions = [predicted(SIZE, 9.0, 10.0, 11.0)]
    assert early_stop_verdicts(predictions, [limit], {}) == ()
    assert early_stop_verdicts(predictions, [limit], {SIZE: 18.0}) == ()
    assert early_stop_verdicts(predictions, [limit], {SIZE: 17.0}) != ()


def test_no_predictions_do_not_stop() -> None:
    assert early_stop_verdicts([], [Limit(metric=SIZE, unit="MiB", absolute=1.0)], {}) == ()


def measured(metric: str, low: float, value: float, high: float, *, noisy: bool = False) -> Measurement:
    return replace(predicted(metric, low, value, high), kind="measured", count=1, noisy=noisy)


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE, is_minimum=st.booleans())
def test_measurement_stops_if_whole_interval_violates(ends: list[float], bound: float, is_minimum: bool) -> None:
    limit = Limit(metric=SIZE, unit="MiB", absolute=bound, is_minimum=is_minimum)
    measurement = measured(SIZE, ends[0], ends[1], ends[2])
    verdicts = early_stop_verdicts([measurement], [limit], {})
    assert bool(verdicts) == ((1 - ends[2] / bound > 0) if is_minimum else (ends[0] / bound - 1 > 0))
    if verdicts:
        assert verdicts == judge([measurement], [limit], {})
        assert not verdicts[0].satisfied


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE, is_minimum=st.booleans())
def test_noisy_measurement_does_not_stop(ends: list[float], bound: float, is_minimum: bool) -> None:
    limit = Limit(metric=SIZE, unit="MiB", absolute=bound, is_minimum=is_minimum)
    assert early_stop_verdicts([measured(SIZE, ends[0], ends[1], ends[2], noisy=True)], [limit], {}) == ()


def test_measurement_overrides_prediction() -> None:
    limit = Limit(metric=SIZE, unit="MiB", absolute=5.0)
    assert early_stop_verdicts([predicted(SIZE, 9.0, 10.0, 11.0), measured(SIZE, 4.0, 4.0, 4.0)], [limit], {}) == ()
    assert (
        early_stop_verdicts([predicted(SIZE, 9.0, 10.0, 11.0), measured(SIZE, 4.0, 6.0, 8.0, noisy=True)], [limit], {})
        == ()
    )


def test_verdicts_distinguish_measured_predicted_and_unknown() -> None:
    limits = [
        Limit(metric=SIZE, unit="MiB", absolute=5.0),
        Limit(metric=THROUGHPUT, unit="MiB", absolute=7.0),
        Limit(metric=PERPLEXITY, unit="", absolute=20.0),
    ]
    values = [predicted(SIZE, 1.0, 1.0, 1.0), predicted(THROUGHPUT, 6.0, 8.0, 9.0), measured(SIZE, 6.0, 7.5, 10.0)]
    size, speed, loss = early_stop_verdicts(values, limits, {})
    assert (size.predicted, size.value, size.excess, size.satisfied) == (False, 7.5, 1.0, False)
    assert (speed.predicted, speed.value, speed.satisfied) == (True, 6.0, True)
    assert (loss.predicted, loss.value, loss.excess, loss.satisfied) == (False, None, None, False)


def test_stopped_result_names_certainly_violated_limit() -> None:
    limits = [
        Limit(metric=SIZE, unit="MiB", absolute=5.0),
        Limit(metric=THROUGHPUT, unit="MiB", absolute=7.0, is_minimum=True),
        Limit(metric=PERPLEXITY, unit="", absolute=20.0),
    ]
    values = (measured(SIZE, 4.0, 6.0, 8.0), measured(THROUGHPUT, 1.0, 2.0, 3.0))
    verdicts = early_stop_verdicts(values, limits, {})
    result = TrialResult(
        recipe={}, target="t", device={}, emulated=False, measurements=values, verdicts=verdicts, refused="x"
    )
    assert [v.metric for v in result.violated] == [THROUGHPUT], "the size interval still overlaps its limit"
    assert result.violated[0].message.startswith(f"{THROUGHPUT}: ")
    assert not result.feasible
