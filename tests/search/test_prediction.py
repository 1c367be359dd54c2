from __future__ import annotations

from dataclasses import replace

import pytest
from support.studies import DECODE, FAILED, LIMITS, RATIO, RSS, SIZE, predicted, prediction

from edgeopt.core.target import Limit
from edgeopt.search.prediction import PREDICTION


def test_recipe_within_predicted_limits_is_not_refused() -> None:
    assert prediction(size=1.0, rss=90.0).refused_result(LIMITS, {}) is None
    assert prediction().refused_result(LIMITS, {}) is None


def test_refused_recipe_has_all_verdicts() -> None:
    result = prediction(rss=180.0).refused_result(LIMITS, {})
    assert result is not None
    assert result.refused == PREDICTION
    assert not result.feasible
    verdicts = {v.metric: v for v in result.verdicts}
    assert verdicts[RSS].excess == pytest.approx(1.0)
    assert verdicts[RSS].predicted
    assert (verdicts[RATIO].excess, verdicts[DECODE].excess) == (None, None)
    assert result.predictions == (predicted(RSS, 180.0),)


@pytest.mark.parametrize(("bounds", "refused"), [({}, False), ({RSS: 100.0}, True), ({RSS: 200.0}, False)])
def test_relative_limit_applies_once_its_bound_is_known(bounds: dict[str, float], refused: bool) -> None:
    limits = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    assert (prediction(rss=150.0).refused_result(limits, bounds) is not None) == refused


def test_better_end_of_prediction_is_judged() -> None:
    exact = prediction(rss=150.0)
    uncertain = replace(exact.result, predictions=(replace(predicted(RSS, 150.0), low=80.0, high=300.0),))
    assert replace(exact, result=uncertain).refused_result(LIMITS, {}) is None
    minimums = (Limit(metric=RSS, unit="MiB", absolute=250.0, is_minimum=True),)
    assert replace(exact, result=uncertain).refused_result(minimums, {}) is None
    assert exact.refused_result(minimums, {}) is not None


def test_unplannable_recipe_is_its_failed_result() -> None:
    unplannable = prediction(failure=FAILED)
    assert unplannable.refused_result((), {}) == unplannable.result
    assert unplannable.result.failure == FAILED


def test_metrics_are_the_predicted_values() -> None:
    assert prediction(size=3.0, rss=70.0).metrics == {SIZE: 3.0, RSS: 70.0}
