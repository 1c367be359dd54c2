from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.studies import FAILED, RSS, SIZE, finished_row, forecast

from edgeopt.core.config_objects import canonical_json
from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective, dominates
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.prediction import Prediction, PredictTrial
from edgeopt.search.samplers.front_refinement import FrontRefinement
from edgeopt.search.samplers.spread import MAX_CANDIDATES, choose_spread, sample_candidates
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary

SMALL = Objective(metric=SIZE)
QUALITY = Objective(metric="quality/accuracy", direction="maximize")
NARROW = (Limit(metric=RSS, unit="MiB", absolute=60.0),)


def foreseen(*points: tuple[float, float], rss: float = 0.0) -> list[tuple[Params, Prediction]]:
    """Recipes of such sizes and damages."""
    return [
        ({"n": n}, forecast(expected_error=expected_error, size=size, rss=rss))
        for n, (size, expected_error) in enumerate(points)
    ]


def chosen_of(*arguments: Any, **more: Any) -> list[Params]:
    """A spread over a space whose one parameter tells recipes hardly apart."""
    return choose_spread(*arguments, space=SearchSpace.parse({"n": {"low": 0, "high": 10**9}}), **more)


def test_among_recipes_that_are_foreseen_alike_choices_are_spread_too() -> None:
    space = SearchSpace.parse({"kind": {"choices": ["a", "b", "c"]}, "size": {"choices": [1, 2]}})
    every = [
        ({"kind": kind, "size": size}, forecast(expected_error=0.1, size=1.0)) for kind in "abc" for size in (1, 2)
    ]
    chosen = choose_spread(every, (SMALL,), (), 3, space=space)
    assert {params["kind"] for params in chosen} == {"a", "b", "c"}
    assert {params["size"] for params in chosen} == {1, 2}


def test_what_is_predicted_of_some_recipes_alone_orders_none() -> None:
    known = [({"n": n}, forecast(expected_error=0.1 * n, size=float(5 - n))) for n in range(3)]
    unknown = [({"n": n}, forecast(expected_error=0.1 * n)) for n in range(3, 6)]
    assert numbers(chosen_of([*known, *unknown], (SMALL,), (), 6)) == [0, 1, 2, 3, 4, 5], "by damage"


def numbers(chosen: list[Params]) -> list[int]:
    return [params["n"] for params in chosen]


# the spread


LINE = [(float(n), float(10 - n)) for n in range(11)]


def test_a_spread_goes_along_the_front_from_end_to_end() -> None:
    chosen = numbers(chosen_of(foreseen(*LINE), (SMALL, QUALITY), (), 3))
    assert chosen[1] in (0, 10)
    assert set(chosen) >= {0, 10}
    assert len(chosen_of(foreseen(*LINE), (SMALL, QUALITY), (), 99)) == 11, "no more than there are"
    assert chosen_of([], (SMALL,), (), 3) == []
    assert chosen_of(foreseen(*LINE), (SMALL,), (), 0) == []


def test_a_spread_keeps_away_from_what_was_tried() -> None:
    chosen = chosen_of(foreseen(*LINE), (SMALL, QUALITY), (), 1, tried=[{"n": 0}, {"n": 1}])
    assert numbers(chosen) == [10]
    everything = chosen_of(foreseen(*LINE), (SMALL, QUALITY), (), 99, tried=[{"n": 4}])
    assert sorted(numbers(everything)) == [n for n in range(11) if n != 4]


def test_what_others_dominate_comes_after_the_front() -> None:
    points = [(9.0, 9.0), (1.0, 2.0), (8.0, 8.0), (2.0, 1.0)]
    chosen = numbers(chosen_of(foreseen(*points), (SMALL, QUALITY), (), 4))
    assert set(chosen[:2]) == {1, 3}
    assert chosen[2:] == [2, 0]


def test_what_breaks_limits_comes_last_and_the_worst_at_the_very_last() -> None:
    sizes = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    found = [
        (params, forecast(expected_error=f.expected_error, size=f.metrics[SIZE], rss=rss))
        for (params, f), rss in zip(foreseen(*sizes), (120.0, 66.0, 50.0), strict=True)
    ]
    assert numbers(chosen_of(found, (SMALL, QUALITY), NARROW, 3)) == [2, 1, 0]


def test_a_relative_limit_is_taken_from_the_prediction_of_the_baseline() -> None:
    relative = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    heavy, light = (
        replace(forecast(expected_error=expected_error, size=size, rss=rss), baseline={RSS: 100.0})
        for expected_error, size, rss in ((0.0, 1.0, 60.0), (1.0, 2.0, 40.0))
    )
    assert chosen_of([({"n": 0}, heavy), ({"n": 1}, light)], (SMALL,), relative, 1) == [{"n": 1}]


def test_a_limit_from_below_is_broken_by_less() -> None:
    minimums = (Limit(metric=RSS, unit="MiB", absolute=100.0, is_minimum=True),)
    found = [*foreseen((1.0, 0.0), rss=50.0), ({"n": 1}, forecast(expected_error=1.0, size=2.0, rss=150.0))]
    assert numbers(chosen_of(found, (SMALL,), minimums, 1)) == [1]


def test_what_cannot_be_planned_is_left_out() -> None:
    found = [*foreseen((5.0, 5.0)), ({"n": 7}, forecast(failure=FAILED))]
    assert numbers(chosen_of(found, (SMALL, QUALITY), (), 9)) == [0]


grid = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(points=st.lists(grid, min_size=1, max_size=15), count=st.integers(0, 9))
def test_a_spread_never_prefers_what_is_dominated_by_something_left_out(
    points: list[tuple[float, float]], count: int
) -> None:
    chosen = numbers(chosen_of(foreseen(*points), (SMALL, QUALITY), (), count))
    assert len(chosen) == len(set(chosen)) == min(count, len(points))
    left = [n for n in range(len(points)) if n not in chosen]
    assert not any(dominates(points[m], points[n]) for m in left for n in chosen)


@settings(max_examples=20)
@given(scale=st.sampled_from([1e-6, 3.0, 1e9]))
def test_units_do_not_matter_to_a_spread(scale: float) -> None:
    scaled = [(size * scale, expected_error) for size, expected_error in LINE]
    objectives = (SMALL, QUALITY)
    assert chosen_of(foreseen(*scaled), objectives, (), 5) == chosen_of(foreseen(*LINE), objectives, (), 5)


def test_candidates_are_all_recipes_or_different_ones_by_chance() -> None:
    few = SearchSpace.parse({"x": {"choices": [1, 2, 3]}})
    assert sorted(params["x"] for params in sample_candidates(few, random.Random(0))) == [1, 2, 3]
    for entry in ({"low": 1, "high": 5000}, {"low": 0.0, "high": 1.0}, {"low": 1, "high": 10**9}):
        found = sample_candidates(SearchSpace.parse({"x": entry}), random.Random(0))
        assert len({canonical_json(params) for params in found}) == len(found)
        assert len(found) == pytest.approx(MAX_CANDIDATES, abs=2)
        assert found == sample_candidates(SearchSpace.parse({"x": entry}), random.Random(0)), "the seed decides"
    assert len(sample_candidates(few, random.Random(0), count=2)) == 2


# the refinement


SPACE = SearchSpace.parse({"bits": {"low": 1, "high": 16, "step": 1}, "kind": {"choices": ["a", "b"]}})


def by_size(params: Mapping[str, Any]) -> Prediction:
    return forecast(
        expected_error=4.0 ** -params["bits"], size=float(params["bits"]) * (1 if params["kind"] == "a" else 3)
    )


def member(number: int, params: Params, **metrics: float) -> Trial:
    named = {SIZE: metrics["size"], QUALITY.metric: metrics["accuracy"]}
    return finished_row(number, params, TrialSummary(feasible=True, metrics=named))


FRONT = [
    member(0, {"bits": 4, "kind": "a"}, size=4.4, accuracy=0.5),
    member(1, {"bits": 8, "kind": "a"}, size=8.2, accuracy=0.8),
]


def best(
    front: list[Trial], tried: set[str] | None = None, predict_trial: PredictTrial = by_size, seed: int = 0
) -> Params | None:
    refinement = FrontRefinement(objectives=(SMALL, QUALITY), space=SPACE, predict_trial=predict_trial)
    return refinement.propose(front, tried or set(), random.Random(seed))


def test_the_neighbour_is_the_one_that_promises_the_largest_growth() -> None:
    """Sizes go with their predictions; of accuracies, of which nothing is predicted, the damage takes its share."""
    points = [(4.4, -0.5), (8.2, -0.8)]
    reference = (8.2 * 1.1, -0.5 + 0.05)
    promised = {}
    for trial in FRONT:
        size, accuracy = trial.summary.metrics[SIZE], trial.summary.metrics[QUALITY.metric]  # type: ignore[union-attr]
        for near in SPACE.neighbours(trial.params, random.Random(0)):
            here, there = by_size(trial.params), by_size(near)
            guess = (
                size * there.metrics[SIZE] / here.metrics[SIZE],
                -accuracy + accuracy * (there.expected_error - here.expected_error),
            )
            promised[canonical_json(near)] = hypervolume([*points, guess], reference)
    chosen = best(FRONT)
    assert promised[canonical_json(chosen)] == max(promised.values()) > hypervolume(points, reference)


def test_a_neighbour_that_was_tried_is_not_tried_again_until_none_is_left() -> None:
    tried: set[str] = set()
    found = []
    while (near := best(FRONT, tried)) is not None:
        assert canonical_json(near) not in tried
        tried.add(canonical_json(near))
        found.append(near)
    expected = {canonical_json(n) for trial in FRONT for n in SPACE.neighbours(trial.params, random.Random(0))}
    assert tried == expected
    assert len(found) == len(expected)


def test_without_a_front_there_is_no_neighbour() -> None:
    assert best([]) is None


def test_a_neighbour_that_cannot_be_planned_is_not_proposed() -> None:
    def predict_trial(params: Mapping[str, Any]) -> Prediction:
        return forecast(failure=FAILED) if params["kind"] == "a" else by_size(params)

    tried: set[str] = set()
    for _ in range(2):
        near = best(FRONT, tried, predict_trial)
        assert near is not None
        assert near["kind"] == "b"
        tried.add(canonical_json(near))
    assert best(FRONT, tried, predict_trial) is None


def test_chance_decides_between_equal_promises() -> None:
    def blind(params: Mapping[str, Any]) -> Prediction:
        return forecast()

    assert len({canonical_json(best(FRONT, predict_trial=blind, seed=seed)) for seed in range(20)}) > 2
