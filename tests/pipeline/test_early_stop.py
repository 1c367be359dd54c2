"""A recipe is refused only where even the best that is possible by what was predicted or measured breaks a limit."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.judge import judge
from edgeopt.core.result import Measurement, TrialResult
from edgeopt.core.target import Limit
from edgeopt.pipeline.early_stop import early_stop_verdicts

SIZE, SPEED, LOSS = "size/engine_mib", "throughput/decode_tokens_per_s", "quality/perplexity"
POSITIVE = st.floats(0.01, 1e6)


def predicted(metric: str, low: float, value: float, high: float) -> Measurement:
    return Measurement(
        metric=metric, unit="MiB", value=value, low=low, high=high, count=0, method="arithmetic", kind="predicted"
    )


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE)
def test_only_what_even_the_best_of_the_band_breaks_is_refused(ends: list[float], bound: float) -> None:
    low, value, high = ends
    upper = early_stop_verdicts(
        [predicted(SIZE, low, value, high)], [Limit(metric=SIZE, unit="MiB", absolute=bound)], {}
    )
    assert bool(upper) == (low / bound - 1 > 0)
    minimum = Limit(metric=SPEED, unit="MiB", absolute=bound, is_minimum=True)
    assert bool(early_stop_verdicts([predicted(SPEED, low, value, high)], [minimum], {})) == (1 - high / bound > 0)


def test_a_refusal_tells_every_limit_and_what_was_predicted() -> None:
    limits = [Limit(metric=SIZE, unit="MiB", absolute=5.0), Limit(metric=LOSS, unit="", absolute=20.0)]
    size, loss = early_stop_verdicts([predicted(SIZE, 9.0, 10.0, 11.0)], limits, {})
    assert (size.predicted, size.satisfied, size.value, size.excess) == (True, False, 9.0, 0.8)
    assert size.reason == "is predicted to be 9 MiB at best, beyond 5 MiB"
    assert (loss.predicted, loss.satisfied, loss.excess) == (False, False, None)


def test_a_limit_relative_to_a_baseline_that_is_not_known_refuses_nothing() -> None:
    limit = Limit(metric=SIZE, unit="MiB", baseline_factor=0.5)
    predictions = [predicted(SIZE, 9.0, 10.0, 11.0)]
    assert early_stop_verdicts(predictions, [limit], {}) == ()
    assert early_stop_verdicts(predictions, [limit], {SIZE: 18.0}) == ()
    assert early_stop_verdicts(predictions, [limit], {SIZE: 17.0}) != ()


def test_without_predictions_nothing_is_refused() -> None:
    assert early_stop_verdicts([], [Limit(metric=SIZE, unit="MiB", absolute=1.0)], {}) == ()


def measured(metric: str, low: float, value: float, high: float, *, noisy: bool = False) -> Measurement:
    return replace(predicted(metric, low, value, high), kind="measured", count=1, noisy=noisy)


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE, is_minimum=st.booleans())
def test_a_measured_interval_refuses_where_all_of_it_lies_beyond_the_limit(
    ends: list[float], bound: float, is_minimum: bool
) -> None:
    limit = Limit(metric=SIZE, unit="MiB", absolute=bound, is_minimum=is_minimum)
    figure = measured(SIZE, ends[0], ends[1], ends[2])
    verdicts = early_stop_verdicts([figure], [limit], {})
    assert bool(verdicts) == ((1 - ends[2] / bound > 0) if is_minimum else (ends[0] / bound - 1 > 0))
    if verdicts:
        assert verdicts == judge([figure], [limit], {})
        assert not verdicts[0].satisfied


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE, is_minimum=st.booleans())
def test_a_noisy_figure_refuses_nothing(ends: list[float], bound: float, is_minimum: bool) -> None:
    limit = Limit(metric=SIZE, unit="MiB", absolute=bound, is_minimum=is_minimum)
    assert early_stop_verdicts([measured(SIZE, ends[0], ends[1], ends[2], noisy=True)], [limit], {}) == ()


def test_what_was_measured_counts_and_not_what_was_predicted_of_it() -> None:
    limit = Limit(metric=SIZE, unit="MiB", absolute=5.0)
    assert early_stop_verdicts([predicted(SIZE, 9.0, 10.0, 11.0), measured(SIZE, 4.0, 4.0, 4.0)], [limit], {}) == ()
    assert (
        early_stop_verdicts([predicted(SIZE, 9.0, 10.0, 11.0), measured(SIZE, 4.0, 6.0, 8.0, noisy=True)], [limit], {})
        == ()
    )


def test_verdicts_tell_measured_predicted_and_unknown_apart() -> None:
    limits = [
        Limit(metric=SIZE, unit="MiB", absolute=5.0),
        Limit(metric=SPEED, unit="MiB", absolute=7.0),
        Limit(metric=LOSS, unit="", absolute=20.0),
    ]
    figures = [predicted(SIZE, 1.0, 1.0, 1.0), predicted(SPEED, 6.0, 8.0, 9.0), measured(SIZE, 6.0, 7.5, 10.0)]
    size, speed, loss = early_stop_verdicts(figures, limits, {})
    assert (size.predicted, size.value, size.excess, size.satisfied) == (False, 7.5, 1.0, False)
    assert (speed.predicted, speed.value, speed.satisfied) == (True, 6.0, True)
    assert (loss.predicted, loss.value, loss.excess, loss.satisfied) == (False, None, None, False)


def test_a_refused_result_tells_which_limit_is_surely_broken() -> None:
    limits = [
        Limit(metric=SIZE, unit="MiB", absolute=5.0),
        Limit(metric=SPEED, unit="MiB", absolute=7.0, is_minimum=True),
        Limit(metric=LOSS, unit="", absolute=20.0),
    ]
    figures = [measured(SIZE, 4.0, 6.0, 8.0), measured(SPEED, 1.0, 2.0, 3.0)]
    verdicts = early_stop_verdicts(figures, limits, {})
    result = TrialResult(
        recipe={}, target="t", device={}, emulated=False, measurements=tuple(figures), verdicts=verdicts, refused="x"
    )
    assert [v.metric for v in result.violated] == [SPEED], "the size may still be within its limit"
    assert result.violated[0].message.startswith(f"{SPEED}: ")
    assert not result.feasible
