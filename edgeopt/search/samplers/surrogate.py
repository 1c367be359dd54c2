"""Propose recipes with Bayesian linear models of the logarithms of metrics.

Recipes of one space differ in few choices, and the effect of a choice on a metric depends little on the other choices.
A linear model therefore learns from a handful of trials, where models without structure need dozens. The proposal is
the recipe with the largest expected hypervolume improvement under constraints (Emmerich et al., 2006,
doi:10.1109/TEVC.2005.859463), estimated by Monte Carlo over samples of the posterior.
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
from edgeopt.search.prediction import Prediction, PredictTrial
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary

if TYPE_CHECKING:
    import numpy as np

PRIOR_STDS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Candidates for the prior standard deviation of a weight, the effect of a choice on a logarithm."""
NOISE_STDS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Candidates for the standard deviation of the noise, which the features do not explain."""
ERROR_FEATURE_SCALE = 10.0
"""Factor on the standardized expected error. It lets the expected error explain more than a single choice."""
POSTERIOR_SAMPLES = 16
MIN_OBSERVATIONS = 2
"""Smallest number of trials for which a target is modelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFeatures:
    """Input of the models for one recipe.

    Attributes:
        features: expected error, followed by the encoded parameters.
        predicted: predicted values by metric. The models predict the ratio of the measured to the predicted value.
    """

    features: Sequence[float]
    predicted: Mapping[str, float]

    @classmethod
    def from_prediction(cls, space: SearchSpace, params: Params, prediction: Prediction) -> RecipeFeatures:
        """Build the features of a recipe from its prediction."""
        return cls(features=[prediction.expected_error, *space.encode(params)], predicted=prediction.metrics)

    def restrict_predicted(self, metrics: Collection[str]) -> RecipeFeatures:
        """Return a copy that keeps the predicted values of `metrics` only."""
        return replace(self, predicted={m: value for m, value in self.predicted.items() if m in metrics})


class LinearSurrogate:
    """Bayesian linear models over the features of recipes, one per target.

    Args:
        recipes: evaluated recipes.
        targets: values of each target in the same order as `recipes`; None if a recipe has no value.
    """

    def __init__(self, recipes: Sequence[RecipeFeatures], targets: Mapping[str, Sequence[float | None]]) -> None:
        import numpy as np

        features = np.array([recipe.features for recipe in recipes], dtype=float)
        self._mean, std = features.mean(axis=0), features.std(axis=0)
        self._scale = np.where(std > 1e-9, std, 1.0)
        self._scale[0] /= ERROR_FEATURE_SCALE
        self._models: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
        for name, values in targets.items():
            observed = [n for n, value in enumerate(values) if value is not None]
            if len(observed) >= MIN_OBSERVATIONS:
                observations = np.array([values[n] for n in observed], dtype=float)
                self._models[name] = self._fit(features[observed], observations)

    @property
    def modelled_targets(self) -> set[str]:
        """Return the targets with enough observations."""
        return set(self._models)

    def sample_posterior(
        self, recipes: Sequence[RecipeFeatures], count: int, rng: random.Random
    ) -> dict[str, np.ndarray]:
        """Return `count` samples of each target from the posterior, as arrays of shape (count, recipes)."""
        import numpy as np

        generator = np.random.default_rng(rng.getrandbits(32))
        features = self._standardize(np.array([recipe.features for recipe in recipes], dtype=float))
        samples = {}
        for name, (intercept, mean, root) in self._models.items():
            weights = mean + generator.standard_normal((count, len(mean))) @ root.T
            samples[name] = intercept + weights @ features.T
        return samples

    def _standardize(self, features: np.ndarray) -> np.ndarray:
        standardized: np.ndarray = (features - self._mean) / self._scale
        return standardized

    def _fit(self, features: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the intercept, the posterior mean of the weights and the Cholesky factor of their covariance.

        The prior and noise standard deviations maximize the evidence (Bishop, 2006, sections 3.3 and 3.5).
        """
        import numpy as np

        x, y = self._standardize(features), values - values.mean()
        best_evidence, best = -math.inf, (np.zeros(x.shape[1]), np.eye(x.shape[1]))
        for prior, noise in itertools.product(PRIOR_STDS, NOISE_STDS):
            precision = np.eye(x.shape[1]) / prior**2 + x.T @ x / noise**2
            covariance = np.linalg.inv(precision)
            mean = covariance @ x.T @ y / noise**2
            misfit = np.sum((y - x @ mean) ** 2) / noise**2 + np.sum(mean**2) / prior**2
            normalization = 2 * len(y) * math.log(noise) + 2 * len(mean) * math.log(prior)
            evidence = -0.5 * (misfit + normalization + np.linalg.slogdet(precision)[1])
            if evidence > best_evidence:
                best_evidence, best = evidence, (mean, covariance)
        mean, covariance = best
        return float(values.mean()), mean, np.linalg.cholesky(covariance + 1e-12 * np.eye(len(mean)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateSampler:
    """Sampler that proposes recipes by a surrogate fitted to the trials of the study."""

    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    space: SearchSpace
    predict_trial: PredictTrial

    def propose(self, trials: Sequence[Trial], candidates: Sequence[Params], rng: random.Random) -> Params | None:
        """Return the candidate with the largest expected improvement of the front of `trials`.

        Return None if no candidate is expected to improve it, or if there are too few trials to model every objective.
        """
        evaluated = [(self._features(trial.params), trial.summary) for trial in trials if trial.summary is not None]
        if not evaluated or not candidates:
            return None
        untried = [self._features(params) for params in candidates]
        # Ratios and plain values cannot share one model: use the ratio only if every recipe has the prediction.
        measured = [recipe.predicted for recipe, summary in evaluated if summary.metrics]
        shared = set.intersection(*map(set, (*measured, *(recipe.predicted for recipe in untried))))
        untried = [recipe.restrict_predicted(shared) for recipe in untried]
        evaluated = [(recipe.restrict_predicted(shared), summary) for recipe, summary in evaluated]
        targets: dict[str, list[float | None]] = {
            **{f"metric {o.metric}": [_log_metric(r, s, o.metric) for r, s in evaluated] for o in self.objectives},
            **{f"limit {x.metric}": [_log_excess(s, x) for _, s in evaluated] for x in self.limits},
        }
        surrogate = LinearSurrogate([recipe for recipe, _ in evaluated], targets)
        if not surrogate.modelled_targets >= {f"metric {o.metric}" for o in self.objectives}:
            return None
        samples = surrogate.sample_posterior(untried, POSTERIOR_SAMPLES, rng)
        feasible = [
            s.metrics for _, s in evaluated if s.feasible and all(o.metric in s.metrics for o in self.objectives)
        ]
        front = [[o.sign * metrics[o.metric] for o in self.objectives] for metrics in feasible]
        improvements = self._improvements(untried, samples, front)
        best = max(range(len(candidates)), key=lambda n: improvements[n])
        return candidates[best] if improvements[best] > 0 else None

    def _improvements(
        self, recipes: Sequence[RecipeFeatures], samples: Mapping[str, np.ndarray], front: list[list[float]]
    ) -> list[float]:
        """Return each recipe's improvement of the hypervolume, summed over the samples in which it is feasible."""
        import numpy as np

        points = np.stack(
            [
                o.sign
                * np.array([recipe.predicted.get(o.metric, 1.0) for recipe in recipes])
                * np.exp(samples[f"metric {o.metric}"])
                for o in self.objectives
            ],
            axis=-1,
        )
        infeasible = np.zeros(points.shape[:2], dtype=bool)
        for limit in self.limits:
            if f"limit {limit.metric}" in samples:
                infeasible |= samples[f"limit {limit.metric}"] > 0
        all_points = [*front, *points[~infeasible].tolist()]
        reference = [max(c) + 0.1 * ((max(c) - min(c)) or 1.0) for c in zip(*all_points, strict=True)]
        current_volume = hypervolume(front, reference)
        improvements = [0.0] * len(recipes)
        for sample, index in np.argwhere(~infeasible):
            point = list(points[sample, index])
            if not any(all(x <= y for x, y in zip(member, point, strict=True)) for member in front):
                improvements[index] += hypervolume([*front, point], reference) - current_volume
        return improvements

    def _features(self, params: Params) -> RecipeFeatures:
        return RecipeFeatures.from_prediction(self.space, params, self.predict_trial(params))


def _log_metric(recipe: RecipeFeatures, summary: TrialSummary, metric: str) -> float | None:
    """Return the logarithm of a metric, or of its ratio to the predicted value; None unless it is positive."""
    return _log(summary.metrics.get(metric, math.nan) / recipe.predicted.get(metric, 1.0))


def _log_excess(summary: TrialSummary, limit: Limit) -> float | None:
    """Return the logarithm of the worse end of the interval relative to the limit; above 0 if the limit is violated.

    Return None if the metric was not measured.
    """
    verdict = summary.verdicts.get(limit.metric)
    if verdict is None or verdict.excess is None or verdict.predicted:
        return None
    ratio = _log(1 - verdict.excess if limit.is_minimum else 1 + verdict.excess)
    return None if ratio is None else -ratio if limit.is_minimum else ratio


def _log(value: float) -> float | None:
    return math.log(value) if math.isfinite(value) and value > 0 else None
