"""What an untried recipe may turn out to be: linear models of logarithms, drawn from their posterior.

Recipes of one space differ in few choices, and what a choice does to a figure is much the same whatever the others
are. So a handful of trials tells much about all recipes, where models without structure need dozens. What is proposed
is the recipe that lets the front grow most on average over some worlds that are still possible, each drawn from the
posterior of the weights: the expected hypervolume improvement under constraints (Emmerich et al., 2006,
doi:10.1109/TEVC.2005.859463) by Monte Carlo.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.prediction import Foresee, Prediction
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.space import Space
from edgeopt.search.storage.summary import Summary
from edgeopt.search.storage.trial import Row

if TYPE_CHECKING:
    import numpy as np

PRIOR_SPREADS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Standard deviations that the effect of a choice on a logarithm may have."""
TRUST = 10.0
"""How many times more the expected damage may explain than a choice: what it tells need not be learnt of each."""
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Standard deviations that what neither choices nor arithmetic explain may have."""
WORLDS = 16
MODELLED = 2
"""Trials from which on a figure is modelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe as the models see it.

    Attributes:
        features: the expected damage, then the place of each parameter.
        predicted: figures by arithmetic, of which only the ratio to what is measured is modelled.
    """

    features: Sequence[float]
    predicted: Mapping[str, float]

    @classmethod
    def of(cls, space: Space, params: Params, forecast: Prediction) -> Recipe:
        return cls(features=[forecast.expected_error, *space.places(params)], predicted=forecast.figures)

    def only(self, metrics: Collection[str]) -> Recipe:
        """The same without what is predicted of others than `metrics`."""
        return replace(self, predicted={m: value for m, value in self.predicted.items() if m in metrics})


class Surrogate:
    """Linear models over the features of recipes.

    Args:
        recipes: those that were evaluated.
        targets: by name, what is modelled of each recipe; None where a recipe teaches nothing of it.
    """

    def __init__(self, recipes: Sequence[Recipe], targets: Mapping[str, Sequence[float | None]]) -> None:
        import numpy as np

        rows = np.array([recipe.features for recipe in recipes], dtype=float)
        self._centre, spread = rows.mean(axis=0), rows.std(axis=0)
        self._scale = np.where(spread > 1e-9, spread, 1.0)
        self._scale[0] /= TRUST
        self._models: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
        for name, values in targets.items():
            known = [n for n, value in enumerate(values) if value is not None]
            if len(known) >= MODELLED:
                self._models[name] = self._fitted(rows[known], np.array([values[n] for n in known], dtype=float))

    @property
    def names(self) -> set[str]:
        """What there were trials enough to model."""
        return set(self._models)

    def worlds(self, recipes: Sequence[Recipe], count: int, chance: random.Random) -> dict[str, np.ndarray]:
        """What each target may be: arrays of shape (worlds, recipes), drawn from the posterior."""
        import numpy as np

        generator = np.random.default_rng(chance.getrandbits(32))
        given = self._scaled(np.array([recipe.features for recipe in recipes], dtype=float))
        drawn = {}
        for name, (middle, mean, root) in self._models.items():
            weights = mean + generator.standard_normal((count, len(mean))) @ root.T
            drawn[name] = middle + weights @ given.T
        return drawn

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = (rows - self._centre) / self._scale
        return scaled

    def _fitted(self, rows: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Middle of the values, mean of the weights, and a root of their covariance.

        Of the prior spreads and noises those that make the values most likely (Bishop, 2006, sections 3.3 and 3.5).
        """
        import numpy as np

        given, centred = self._scaled(rows), values - values.mean()
        best, found = -math.inf, (np.zeros(given.shape[1]), np.eye(given.shape[1]))
        for spread, noise in itertools.product(PRIOR_SPREADS, NOISES):
            precision = np.eye(given.shape[1]) / spread**2 + given.T @ given / noise**2
            covariance = np.linalg.inv(precision)
            mean = covariance @ given.T @ centred / noise**2
            misfit = np.sum((centred - given @ mean) ** 2) / noise**2 + np.sum(mean**2) / spread**2
            size = 2 * len(centred) * math.log(noise) + 2 * len(mean) * math.log(spread)
            evidence = -0.5 * (misfit + size + np.linalg.slogdet(precision)[1])
            if evidence > best:
                best, found = evidence, (mean, covariance)
        mean, covariance = found
        return float(values.mean()), mean, np.linalg.cholesky(covariance + 1e-12 * np.eye(len(mean)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """Proposes by a surrogate of the search's own trials."""

    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    space: Space
    predict_trial: Foresee

    def best(self, rows: Sequence[Row], candidates: Sequence[Params], chance: random.Random) -> Params | None:
        """Of the candidates, that which lets the front of `rows` grow most on average; None where none does.

        None too while the trials are too few to model every objective.
        """
        known = [(self._seen(row.params), row.summary) for row in rows if row.summary is not None]
        if not known or not candidates:
            return None
        seen = [self._seen(params) for params in candidates]
        # a ratio to what is predicted of some recipes and not of others would be no one quantity
        measured = [recipe.predicted for recipe, summary in known if summary.metrics]
        shared = set.intersection(*map(set, (*measured, *(recipe.predicted for recipe in seen))))
        seen, known = [recipe.only(shared) for recipe in seen], [(recipe.only(shared), s) for recipe, s in known]
        recipes = [recipe for recipe, _ in known]
        targets: dict[str, list[float | None]] = {
            **{f"figure {o.metric}": [_figure(r, s, o.metric) for r, s in known] for o in self.objectives},
            **{f"limit {x.metric}": [_excess(s, x) for _, s in known] for x in self.limits},
        }
        surrogate = Surrogate(recipes, targets)
        if not surrogate.names >= {f"figure {o.metric}" for o in self.objectives}:
            return None
        worlds = surrogate.worlds(seen, WORLDS, chance)
        kept = [s.metrics for _, s in known if s.feasible and all(o.metric in s.metrics for o in self.objectives)]
        growth = self._growth(seen, worlds, [[o.sign * metrics[o.metric] for o in self.objectives] for metrics in kept])
        index = max(range(len(candidates)), key=lambda n: growth[n])
        return candidates[index] if growth[index] > 0 else None

    def _growth(
        self, seen: Sequence[Recipe], worlds: Mapping[str, np.ndarray], front: list[list[float]]
    ) -> list[float]:
        """By how much each candidate lets the front's hypervolume grow, over all worlds in which it is feasible."""
        import numpy as np

        figures = np.stack(
            [
                o.sign
                * np.array([recipe.predicted.get(o.metric, 1.0) for recipe in seen])
                * np.exp(worlds[f"figure {o.metric}"])
                for o in self.objectives
            ],
            axis=-1,
        )
        broken = np.zeros(figures.shape[:2], dtype=bool)
        for limit in self.limits:
            if f"limit {limit.metric}" in worlds:
                broken |= worlds[f"limit {limit.metric}"] > 0
        every = [*front, *figures[~broken].tolist()]
        reference = [max(c) + 0.1 * ((max(c) - min(c)) or 1.0) for c in zip(*every, strict=True)]
        before = hypervolume(front, reference)
        growth = [0.0] * len(seen)
        for world, index in np.argwhere(~broken):
            point = list(figures[world, index])
            if not any(all(x <= y for x, y in zip(member, point, strict=True)) for member in front):
                growth[index] += hypervolume([*front, point], reference) - before
        return growth

    def _seen(self, params: Params) -> Recipe:
        return Recipe.of(self.space, params, self.predict_trial(params))


def _figure(recipe: Recipe, summary: Summary, metric: str) -> float | None:
    """The logarithm of a figure, or of its ratio to what was predicted."""
    return _logarithm(summary.metrics.get(metric, math.nan) / recipe.predicted.get(metric, 1.0))


def _excess(summary: Summary, limit: Limit) -> float | None:
    """The logarithm of the worse end of a figure's interval as a multiple of its limit: above zero it is broken."""
    held = summary.verdicts.get(limit.metric)
    if held is None or held.excess is None or held.predicted:
        return None
    ratio = _logarithm(1 - held.excess if limit.is_minimum else 1 + held.excess)
    return None if ratio is None else -ratio if limit.is_minimum else ratio


def _logarithm(value: float) -> float | None:
    return math.log(value) if math.isfinite(value) and value > 0 else None
