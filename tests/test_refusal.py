"""A recipe is refused by prediction only where even the best that the prediction allows breaks a limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeopt.result import Measurement
from edgeopt.rungs import refusal
from edgeopt.target import Limit

SIZE, SPEED, LOSS = "size/engine_mib", "throughput/decode_tokens_per_s", "quality/perplexity"
POSITIVE = st.floats(0.01, 1e6)


def predicted(metric: str, low: float, value: float, high: float) -> Measurement:
    return Measurement(
        metric=metric, unit="MiB", value=value, low=low, high=high, count=0, method="arithmetic", kind="predicted"
    )


@given(ends=st.tuples(POSITIVE, POSITIVE, POSITIVE).map(sorted), bound=POSITIVE)
def test_only_what_even_the_best_of_the_band_breaks_is_refused(ends: list[float], bound: float) -> None:
    low, value, high = ends
    upper = refusal([predicted(SIZE, low, value, high)], [Limit(metric=SIZE, unit="MiB", absolute=bound)], {})
    assert bool(upper) == (low / bound - 1 > 0)
    least = Limit(metric=SPEED, unit="MiB", absolute=bound, least=True)
    assert bool(refusal([predicted(SPEED, low, value, high)], [least], {})) == (1 - high / bound > 0)


def test_a_refusal_tells_every_limit_and_what_was_predicted() -> None:
    limits = [Limit(metric=SIZE, unit="MiB", absolute=5.0), Limit(metric=LOSS, unit="", absolute=20.0)]
    size, loss = refusal([predicted(SIZE, 9.0, 10.0, 11.0)], limits, {})
    assert (size.predicted, size.kept, size.value, size.excess) == (True, False, 9.0, 0.8)
    assert size.reason == "is predicted to be 9 MiB at best, beyond 5 MiB"
    assert (loss.predicted, loss.kept, loss.excess) == (False, False, None)


def test_a_limit_relative_to_a_baseline_that_is_not_known_refuses_nothing() -> None:
    limit = Limit(metric=SIZE, unit="MiB", baseline_factor=0.5)
    predictions = [predicted(SIZE, 9.0, 10.0, 11.0)]
    assert refusal(predictions, [limit], {}) == ()
    assert refusal(predictions, [limit], {SIZE: 18.0}) == ()
    assert refusal(predictions, [limit], {SIZE: 17.0}) != ()


def test_without_predictions_nothing_is_refused() -> None:
    assert refusal([], [Limit(metric=SIZE, unit="MiB", absolute=1.0)], {}) == ()
