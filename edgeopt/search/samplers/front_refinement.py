"""Which recipe comes next: a spread by the estimate, then a sampler's proposals, at last the front's neighbours."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeopt.core.config_objects import canonical_json
from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective, pareto_ranks
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.prediction import Foresee, Prediction
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.space import Space
from edgeopt.search.storage.trial import Row

LOOKED_AT = 256
"""Recipes that are foreseen to choose a spread from."""
LISTED = 20_000
"""Recipes up to which a space is listed, so that it is known when all were tried."""


def candidates(space: Space, chance: random.Random, count: int = LOOKED_AT) -> list[Params]:
    """Up to `count` different recipes of the space in random order, or all where there are no more."""
    every = space.every(LISTED)
    if every is not None:
        listed = list(every)
        return chance.sample(listed, min(count, len(listed)))
    return list({canonical_json(params): params for params in (space.draw(chance) for _ in range(count))}.values())


def spread(
    foreseen: Sequence[tuple[Params, Prediction]],
    objectives: Sequence[Objective],
    limits: Sequence[Limit],
    count: int,
    *,
    space: Space,
    tried: Iterable[Params] = (),
) -> list[Params]:
    """`count` recipes along the front of what is foreseen, each as far as can be from those taken before.

    Far in what is foreseen, and in the choices that lead there: arithmetic does not see all that they do.

    What is foreseen: the objectives that can be predicted of all recipes, and the damage to the weights in place of
    those that cannot. Recipes that would break a limit come last; limits relative to the baseline are taken from its
    prediction.
    """
    whole = [(params, f) for params, f in foreseen if f.result.failure is None]
    if not whole:
        return []
    predicted = [o for o in objectives if all(o.metric in forecast.figures for _, forecast in whole)]
    points = [_foreseen(forecast, predicted) for _, forecast in whole]
    broken = [_broken(forecast, limits) for _, forecast in whole]
    order = [(over, rank) for over, rank in zip(broken, pareto_ranks(points), strict=True)]
    axes = [sorted({point[n] for point in points}) for n in range(len(points[0]))]
    places = [
        [*(_place(axis, x) for axis, x in zip(axes, point, strict=True)), *space.places(params)]
        for (params, _), point in zip(whole, points, strict=True)
    ]
    seen = {canonical_json(params) for params in tried}
    taken = [n for n, (params, _) in enumerate(whole) if canonical_json(params) in seen]
    fresh = [n for n in range(len(whole)) if n not in taken]
    chosen: list[int] = []
    while fresh and len(chosen) < count:
        best = min(order[n][0] for n in fresh)
        able = [n for n in fresh if order[n][0] == best]
        first = min(order[n][1] for n in able)
        able = [n for n in able if order[n][1] <= first]
        far = max(able, key=lambda n: min((math.dist(places[n], places[m]) for m in [*taken, *chosen]), default=0.0))
        chosen.append(far)
        fresh.remove(far)
    return [whole[n][0] for n in chosen]


def _foreseen(forecast: Prediction, predicted: Sequence[Objective]) -> list[float]:
    figures = forecast.figures
    return [*(o.sign * figures[o.metric] for o in predicted), forecast.expected_error]


def _broken(forecast: Prediction, limits: Sequence[Limit]) -> float:
    """By which share limits are broken together, so that what just misses one is tried before what misses all."""
    figures, total = forecast.figures, 0.0
    for limit in limits:
        bound = limit.bound(forecast.baseline.get(limit.metric))
        if bound and limit.metric in figures:
            ratio = figures[limit.metric] / bound
            total += max(0.0, 1 - ratio if limit.is_minimum else ratio - 1)
    return total


def _place(axis: Sequence[float], x: float) -> float:
    """Where a value stands among all others, from 0 to 1: no unit and no outlier weighs more."""
    return axis.index(x) / max(1, len(axis) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """The neighbour of the front that promises the largest growth of its hypervolume.

    A neighbour is taken to differ from its member in the same ratio as their predictions, and in what is not predicted
    by the damage to the weights.
    """

    objectives: tuple[Objective, ...]
    space: Space
    predict_trial: Foresee

    def best(self, front: Sequence[Row], tried: set[str], chance: random.Random) -> Params | None:
        """An untried neighbour of the rows of a front; None where all were tried."""
        members = [(row, self._point(row)) for row in front]
        points = [point for _, point in members]
        if not points:
            return None
        worst = [max(column) for column in zip(*points, strict=True)]
        reference = [x + 0.1 * abs(x) for x in worst]
        before = hypervolume(points, reference)
        found: dict[str, tuple[float, float, Params]] = {}
        for row, point in members:
            here = self.predict_trial(row.params)
            for params in self.space.neighbours(row.params, chance):
                key = canonical_json(params)
                if key in tried or key in found:
                    continue
                there = self.predict_trial(params)
                if there.result.failure is None:
                    guess = self._guessed(point, here, there)
                    growth = hypervolume([*points, guess], reference) - before
                    found[key] = (growth, chance.random(), params)
        return max(found.values(), key=lambda entry: entry[:2])[2] if found else None

    def _point(self, row: Row) -> list[float]:
        assert row.summary is not None
        metrics: Mapping[str, float] = row.summary.metrics
        return [o.sign * metrics[o.metric] for o in self.objectives]

    def _guessed(self, point: Sequence[float], here: Prediction, there: Prediction) -> list[float]:
        guess = []
        for value, objective in zip(point, self.objectives, strict=True):
            before, after = here.figures.get(objective.metric), there.figures.get(objective.metric)
            if before and after is not None:
                guess.append(value * after / before)
            else:
                guess.append(value + abs(value) * (there.expected_error - here.expected_error))
        return guess
