from __future__ import annotations

from dataclasses import replace

import pytest
from support.studies import DECODE, FAILED, LIMITS, RATIO, RSS, SIZE, forecast, predicted

from edgeopt.core.target import Limit
from edgeopt.search.prediction import PREDICTION


def test_a_recipe_that_keeps_all_limits_as_far_as_is_known_is_not_refused() -> None:
    assert forecast(size=1.0, rss=90.0).refused_result(LIMITS, {}) is None
    assert forecast().refused_result(LIMITS, {}) is None


def test_a_recipe_that_breaks_a_limit_is_refused_with_all_verdicts() -> None:
    result = forecast(rss=180.0).refused_result(LIMITS, {})
    assert result is not None
    assert result.refused == PREDICTION
    assert not result.feasible
    held = {v.metric: v for v in result.verdicts}
    assert held[RSS].excess == pytest.approx(1.0)
    assert held[RSS].predicted
    assert (held[RATIO].excess, held[DECODE].excess) == (None, None)
    assert result.predictions == (predicted(RSS, 180.0),)


@pytest.mark.parametrize(("bounds", "refused"), [({}, False), ({RSS: 100.0}, True), ({RSS: 200.0}, False)])
def test_a_relative_limit_holds_as_soon_as_its_bound_is_known(bounds: dict[str, float], refused: bool) -> None:
    limits = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    assert (forecast(rss=150.0).refused_result(limits, bounds) is not None) == refused


def test_only_the_best_that_a_prediction_allows_for_is_held_against_a_limit() -> None:
    made = forecast(rss=150.0)
    hoped = replace(made.result, predictions=(replace(predicted(RSS, 150.0), low=80.0, high=300.0),))
    assert replace(made, result=hoped).refused_result(LIMITS, {}) is None
    minimums = (Limit(metric=RSS, unit="MiB", absolute=250.0, is_minimum=True),)
    assert replace(made, result=hoped).refused_result(minimums, {}) is None
    assert made.refused_result(minimums, {}) is not None


def test_a_recipe_that_cannot_be_planned_is_its_own_failed_result() -> None:
    made = forecast(failure=FAILED)
    assert made.refused_result((), {}) == made.result
    assert made.result.failure == FAILED


def test_figures_are_the_predicted_values() -> None:
    assert forecast(size=3.0, rss=70.0).metrics == {SIZE: 3.0, RSS: 70.0}
