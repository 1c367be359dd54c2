"""Propose neighbours of the Pareto front."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgeopt.core.config_objects import canonical_json
from edgeopt.search.pareto.front import Objective
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.prediction import Prediction, PredictTrial
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace
from edgeopt.search.storage.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRefinement:
    """Sampler that proposes the neighbour of the front with the largest expected growth of the hypervolume.

    The metrics of a neighbour are those of its trial on the front, scaled by the ratio of both predictions. Metrics
    without a prediction change in proportion to the difference of expected errors.
    """

    objectives: tuple[Objective, ...]
    space: SearchSpace
    predict_trial: PredictTrial

    def propose(self, front: Sequence[Trial], tried: Collection[str], rng: random.Random) -> Params | None:
        """Return an untried neighbour; None if the front is empty or all of its neighbours were tried.

        Args:
            front: trials on the front.
            tried: canonical JSON of the recipes tried so far.
        """
        members = [(trial, self._point(trial)) for trial in front]
        points = [point for _, point in members]
        if not points:
            return None
        worst = [max(column) for column in zip(*points, strict=True)]
        reference = [x + 0.1 * abs(x) for x in worst]
        current_volume = hypervolume(points, reference)
        candidates: dict[str, tuple[float, float, Params]] = {}
        for trial, point in members:
            trial_prediction = self.predict_trial(trial.params)
            for params in self.space.neighbours(trial.params, rng):
                key = canonical_json(params)
                if key in tried or key in candidates:
                    continue
                prediction = self.predict_trial(params)
                if prediction.result.failure is None:
                    expected_point = self._expected_point(point, trial_prediction, prediction)
                    growth = hypervolume([*points, expected_point], reference) - current_volume
                    candidates[key] = (growth, rng.random(), params)
        return max(candidates.values(), key=lambda entry: entry[:2])[2] if candidates else None

    def _point(self, trial: Trial) -> list[float]:
        assert trial.summary is not None
        return [o.sign * trial.summary.metrics[o.metric] for o in self.objectives]

    def _expected_point(self, point: Sequence[float], before: Prediction, after: Prediction) -> list[float]:
        expected = []
        for value, objective in zip(point, self.objectives, strict=True):
            old, new = before.metrics.get(objective.metric), after.metrics.get(objective.metric)
            if old and new is not None:
                expected.append(value * new / old)
            else:
                expected.append(value + abs(value) * (after.expected_error - before.expected_error))
        return expected
