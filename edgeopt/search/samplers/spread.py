"""Choose the initial recipes of a search: a spread along the front of the predictions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from edgeopt.core.config_objects import canonical_json
from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective, pareto_ranks
from edgeopt.search.prediction import Prediction
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace

MAX_CANDIDATES = 256
"""Number of recipes that are predicted to choose the spread from."""
MAX_LISTED = 20_000
"""Number of recipes up to which a space is listed completely, so that the search knows when all were tried."""


def sample_candidates(space: SearchSpace, rng: random.Random, count: int = MAX_CANDIDATES) -> list[Params]:
    """Return up to `count` distinct recipes of the space in random order."""
    recipes = space.list_recipes(MAX_LISTED)
    if recipes is not None:
        listed = list(recipes)
        return rng.sample(listed, min(count, len(listed)))
    return list({canonical_json(params): params for params in (space.sample(rng) for _ in range(count))}.values())


def choose_spread(
    predictions: Sequence[tuple[Params, Prediction]],
    objectives: Sequence[Objective],
    limits: Sequence[Limit],
    count: int,
    *,
    space: SearchSpace,
    tried: Iterable[Params] = (),
) -> list[Params]:
    """Return `count` recipes along the front of the predictions, each as far as possible from those chosen before.

    The front uses the objectives predicted for every recipe, and the expected error in place of the others. The
    distance includes the encoded parameters, because predictions do not cover all of their effects. Recipes that
    exceed a limit come last. A limit relative to the baseline uses the predicted baseline.

    Args:
        predictions: candidate recipes with their predictions; recipes that cannot be planned are ignored.
        tried: recipes to stay away from. They are not returned.
    """
    plannable = [(params, prediction) for params, prediction in predictions if prediction.result.failure is None]
    if not plannable:
        return []
    predicted = [o for o in objectives if all(o.metric in prediction.metrics for _, prediction in plannable)]
    points = [_point(prediction, predicted) for _, prediction in plannable]
    excesses = [_total_excess(prediction, limits) for _, prediction in plannable]
    order = list(zip(excesses, pareto_ranks(points), strict=True))
    axes = [sorted({point[n] for point in points}) for n in range(len(points[0]))]
    positions = [
        [*(_relative_rank(axis, x) for axis, x in zip(axes, point, strict=True)), *space.encode(params)]
        for (params, _), point in zip(plannable, points, strict=True)
    ]
    tried_keys = {canonical_json(params) for params in tried}
    avoided = [n for n, (params, _) in enumerate(plannable) if canonical_json(params) in tried_keys]
    remaining = [n for n in range(len(plannable)) if n not in avoided]
    chosen: list[int] = []
    while remaining and len(chosen) < count:
        best = min(order[n] for n in remaining)
        farthest = max(
            (n for n in remaining if order[n] == best),
            key=lambda n: min((math.dist(positions[n], positions[m]) for m in [*avoided, *chosen]), default=0.0),
        )
        chosen.append(farthest)
        remaining.remove(farthest)
    return [plannable[n][0] for n in chosen]


def _point(prediction: Prediction, objectives: Sequence[Objective]) -> list[float]:
    """Return the predicted objectives and the expected error, all to be minimized."""
    metrics = prediction.metrics
    return [*(o.sign * metrics[o.metric] for o in objectives), prediction.expected_error]


def _total_excess(prediction: Prediction, limits: Sequence[Limit]) -> float:
    """Return the sum of relative excesses over all limits: a near miss comes before a clear violation."""
    metrics, total = prediction.metrics, 0.0
    for limit in limits:
        bound = limit.bound(prediction.baseline.get(limit.metric))
        if bound and limit.metric in metrics:
            ratio = metrics[limit.metric] / bound
            total += max(0.0, 1 - ratio if limit.is_minimum else ratio - 1)
    return total


def _relative_rank(axis: Sequence[float], value: float) -> float:
    """Return the rank of a value among all values, from 0 to 1, independent of units and outliers."""
    return axis.index(value) / max(1, len(axis) - 1)
