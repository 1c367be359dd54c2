from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from support.studies import FAILED, SIZE, finished_trial, prediction

from edgeopt.core.config_objects import canonical_json
from edgeopt.search.pareto.front import Objective
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.prediction import Prediction, PredictTrial
from edgeopt.search.samplers.front_refinement import FrontRefinement
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary

SMALL = Objective(metric=SIZE)
QUALITY = Objective(metric="quality/accuracy", direction="maximize")
SPACE = SearchSpace.parse({"bits": {"low": 1, "high": 16, "step": 1}, "kind": {"choices": ["a", "b"]}})


def predict_by_size(params: Mapping[str, Any]) -> Prediction:
    return prediction(
        expected_error=4.0 ** -params["bits"], size=float(params["bits"]) * (1 if params["kind"] == "a" else 3)
    )


def front_trial(number: int, params: Params, **metrics: float) -> Trial:
    values = {SIZE: metrics["size"], QUALITY.metric: metrics["accuracy"]}
    return finished_trial(number, params, TrialSummary(feasible=True, metrics=values))


FRONT = [
    front_trial(0, {"bits": 4, "kind": "a"}, size=4.4, accuracy=0.5),
    front_trial(1, {"bits": 8, "kind": "a"}, size=8.2, accuracy=0.8),
]


def propose(
    front: list[Trial], tried: set[str] | None = None, predict_trial: PredictTrial = predict_by_size, seed: int = 0
) -> Params | None:
    refinement = FrontRefinement(objectives=(SMALL, QUALITY), space=SPACE, predict_trial=predict_trial)
    return refinement.propose(front, tried or set(), random.Random(seed))


def test_neighbour_with_largest_growth_is_proposed() -> None:
    """The size scales with its prediction; the accuracy, without a prediction, changes with the expected error."""
    points = [(4.4, -0.5), (8.2, -0.8)]
    reference = (8.2 * 1.1, -0.5 + 0.05)
    expected = {}
    for trial in FRONT:
        size, accuracy = trial.summary.metrics[SIZE], trial.summary.metrics[QUALITY.metric]  # type: ignore[union-attr]
        for neighbour in SPACE.neighbours(trial.params, random.Random(0)):
            before, after = predict_by_size(trial.params), predict_by_size(neighbour)
            point = (
                size * after.metrics[SIZE] / before.metrics[SIZE],
                -accuracy + accuracy * (after.expected_error - before.expected_error),
            )
            expected[canonical_json(neighbour)] = hypervolume([*points, point], reference)
    chosen = propose(FRONT)
    assert expected[canonical_json(chosen)] == max(expected.values()) > hypervolume(points, reference)


def test_every_neighbour_is_proposed_once() -> None:
    tried: set[str] = set()
    proposed = []
    while (neighbour := propose(FRONT, tried)) is not None:
        assert canonical_json(neighbour) not in tried
        tried.add(canonical_json(neighbour))
        proposed.append(neighbour)
    expected = {canonical_json(n) for trial in FRONT for n in SPACE.neighbours(trial.params, random.Random(0))}
    assert tried == expected
    assert len(proposed) == len(expected)


def test_empty_front_has_no_neighbours() -> None:
    assert propose([]) is None


def test_unplannable_neighbour_is_not_proposed() -> None:
    def predict_trial(params: Mapping[str, Any]) -> Prediction:
        return prediction(failure=FAILED) if params["kind"] == "a" else predict_by_size(params)

    tried: set[str] = set()
    for _ in range(2):
        neighbour = propose(FRONT, tried, predict_trial)
        assert neighbour is not None
        assert neighbour["kind"] == "b"
        tried.add(canonical_json(neighbour))
    assert propose(FRONT, tried, predict_trial) is None


def test_ties_are_broken_at_random() -> None:
    def predict_nothing(params: Mapping[str, Any]) -> Prediction:
        return prediction()

    assert len({canonical_json(propose(FRONT, predict_trial=predict_nothing, seed=seed)) for seed in range(20)}) > 2
