from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.studies import FAILED, RSS, SIZE, prediction

from edgeopt.core.config_objects import canonical_json
from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective, dominates
from edgeopt.search.prediction import Prediction
from edgeopt.search.samplers.spread import MAX_CANDIDATES, choose_spread, sample_candidates
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace

SMALL = Objective(metric=SIZE)
QUALITY = Objective(metric="quality/accuracy", direction="maximize")
NARROW = (Limit(metric=RSS, unit="MiB", absolute=60.0),)


def predictions(*points: tuple[float, float], rss: float = 0.0) -> list[tuple[Params, Prediction]]:
    """Return recipes with predicted sizes and expected errors."""
    return [
        ({"n": n}, prediction(expected_error=expected_error, size=size, rss=rss))
        for n, (size, expected_error) in enumerate(points)
    ]


def choose(*arguments: Any, **options: Any) -> list[Params]:
    """Choose a spread in a space in which all recipes have almost equal features."""
    return choose_spread(*arguments, space=SearchSpace.parse({"n": {"low": 0, "high": 10**9}}), **options)


def numbers(chosen: list[Params]) -> list[int]:
    return [params["n"] for params in chosen]


def test_equal_predictions_are_spread_over_choices() -> None:
    space = SearchSpace.parse({"kind": {"choices": ["a", "b", "c"]}, "size": {"choices": [1, 2]}})
    candidates = [
        ({"kind": kind, "size": size}, prediction(expected_error=0.1, size=1.0)) for kind in "abc" for size in (1, 2)
    ]
    chosen = choose_spread(candidates, (SMALL,), (), 3, space=space)
    assert {params["kind"] for params in chosen} == {"a", "b", "c"}
    assert {params["size"] for params in chosen} == {1, 2}


def test_partial_predictions_do_not_order_recipes() -> None:
    predicted = [({"n": n}, prediction(expected_error=0.1 * n, size=float(5 - n))) for n in range(3)]
    unpredicted = [({"n": n}, prediction(expected_error=0.1 * n)) for n in range(3, 6)]
    assert numbers(choose([*predicted, *unpredicted], (SMALL,), (), 6)) == [0, 1, 2, 3, 4, 5], "by expected error"


LINE = [(float(n), float(10 - n)) for n in range(11)]


def test_spread_covers_both_ends_of_the_front() -> None:
    chosen = numbers(choose(predictions(*LINE), (SMALL, QUALITY), (), 3))
    assert chosen[1] in (0, 10)
    assert set(chosen) >= {0, 10}
    assert len(choose(predictions(*LINE), (SMALL, QUALITY), (), 99)) == 11, "all of them"
    assert choose([], (SMALL,), (), 3) == []
    assert choose(predictions(*LINE), (SMALL,), (), 0) == []


def test_spread_keeps_distance_from_tried_recipes() -> None:
    chosen = choose(predictions(*LINE), (SMALL, QUALITY), (), 1, tried=[{"n": 0}, {"n": 1}])
    assert numbers(chosen) == [10]
    remaining = choose(predictions(*LINE), (SMALL, QUALITY), (), 99, tried=[{"n": 4}])
    assert sorted(numbers(remaining)) == [n for n in range(11) if n != 4]


def test_dominated_recipes_come_after_the_front() -> None:
    points = [(9.0, 9.0), (1.0, 2.0), (8.0, 8.0), (2.0, 1.0)]
    chosen = numbers(choose(predictions(*points), (SMALL, QUALITY), (), 4))
    assert set(chosen[:2]) == {1, 3}
    assert chosen[2:] == [2, 0]


def test_limit_violations_come_last_by_excess() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    candidates = [
        (params, prediction(expected_error=p.expected_error, size=p.metrics[SIZE], rss=rss))
        for (params, p), rss in zip(predictions(*points), (120.0, 66.0, 50.0), strict=True)
    ]
    assert numbers(choose(candidates, (SMALL, QUALITY), NARROW, 3)) == [2, 1, 0]


def test_relative_limit_uses_predicted_baseline() -> None:
    relative = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    heavy, light = (
        replace(prediction(expected_error=expected_error, size=size, rss=rss), baseline={RSS: 100.0})
        for expected_error, size, rss in ((0.0, 1.0, 60.0), (1.0, 2.0, 40.0))
    )
    assert choose([({"n": 0}, heavy), ({"n": 1}, light)], (SMALL,), relative, 1) == [{"n": 1}]


def test_lower_limit_is_violated_by_smaller_values() -> None:
    minimums = (Limit(metric=RSS, unit="MiB", absolute=100.0, is_minimum=True),)
    candidates = [*predictions((1.0, 0.0), rss=50.0), ({"n": 1}, prediction(expected_error=1.0, size=2.0, rss=150.0))]
    assert numbers(choose(candidates, (SMALL,), minimums, 1)) == [1]


def test_unplannable_recipe_is_left_out() -> None:
    candidates = [*predictions((5.0, 5.0)), ({"n": 7}, prediction(failure=FAILED))]
    assert numbers(choose(candidates, (SMALL, QUALITY), (), 9)) == [0]


coordinates = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(points=st.lists(coordinates, min_size=1, max_size=15), count=st.integers(0, 9))
def test_spread_skips_no_dominating_recipe(points: list[tuple[float, float]], count: int) -> None:
    chosen = numbers(choose(predictions(*points), (SMALL, QUALITY), (), count))
    assert len(chosen) == len(set(chosen)) == min(count, len(points))
    skipped = [n for n in range(len(points)) if n not in chosen]
    assert not any(dominates(points[m], points[n]) for m in skipped for n in chosen)


@settings(max_examples=20)
@given(scale=st.sampled_from([1e-6, 3.0, 1e9]))
def test_spread_is_independent_of_units(scale: float) -> None:
    scaled = [(size * scale, expected_error) for size, expected_error in LINE]
    objectives = (SMALL, QUALITY)
    assert choose(predictions(*scaled), objectives, (), 5) == choose(predictions(*LINE), objectives, (), 5)


def test_candidates_are_distinct_and_reproducible() -> None:
    few = SearchSpace.parse({"x": {"choices": [1, 2, 3]}})
    assert sorted(params["x"] for params in sample_candidates(few, random.Random(0))) == [1, 2, 3]
    for entry in ({"low": 1, "high": 5000}, {"low": 0.0, "high": 1.0}, {"low": 1, "high": 10**9}):
        space = SearchSpace.parse({"x": entry})
        candidates = sample_candidates(space, random.Random(0))
        assert len({canonical_json(params) for params in candidates}) == len(candidates)
        assert len(candidates) == pytest.approx(MAX_CANDIDATES, abs=2)
        assert candidates == sample_candidates(space, random.Random(0)), "equal seeds give equal candidates"
    assert len(sample_candidates(few, random.Random(0), count=2)) == 2
