from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from support.studies import DECODE, LIMITS, RATIO, finished_trial, predicted

from edgeopt.core.result import TrialResult
from edgeopt.search.pareto.front import Objective
from edgeopt.search.prediction import Prediction
from edgeopt.search.samplers import surrogate as module
from edgeopt.search.samplers.surrogate import LinearSurrogate, RecipeFeatures, SurrogateSampler
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import SearchSpace
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary, VerdictSummary

SPACE = SearchSpace.parse(
    {"kind": {"choices": ["a", "b", "c"]}, "size": {"choices": [1, 2, 4, 8]}, "cut": {"low": 0.0, "high": 0.5}}
)
OBJECTIVES = (Objective(metric=RATIO), Objective(metric=DECODE))


def recipes(features: np.ndarray) -> list[RecipeFeatures]:
    return [RecipeFeatures(features=list(row), predicted={}) for row in features]


def predict_trial(params: Params) -> Prediction:
    result = TrialResult(recipe={}, target="t", device={}, emulated=False)
    return Prediction(result=result, expected_error=params["cut"])


def true_metrics(params: Params) -> tuple[float, float]:
    """Return ratio and decode time, whose logarithms are linear in the choices."""
    kind = {"a": 0.1, "b": 0.0, "c": 0.05}[params["kind"]]
    return math.exp(kind + 0.3 * params["cut"]), math.exp(-0.3 * params["cut"] - 0.05 * math.log2(params["size"]))


def evaluated_trial(number: int, params: Params) -> Trial:
    ratio, decode = true_metrics(params)
    metrics = {RATIO: ratio, DECODE: decode}
    verdicts = {}
    for limit in LIMITS[:2]:
        assert limit.absolute is not None
        excess = metrics[limit.metric] / limit.absolute - 1
        verdicts[limit.metric] = VerdictSummary(
            excess=excess, satisfied=excess <= 0, predicted=False, bound=limit.absolute
        )
    feasible = all(verdict.satisfied for verdict in verdicts.values())
    return finished_trial(number, params, TrialSummary(feasible=feasible, metrics=metrics, verdicts=verdicts))


def create_sampler(**fields: Any) -> SurrogateSampler:
    defaults: dict[str, Any] = {
        "objectives": OBJECTIVES,
        "limits": LIMITS[:2],
        "space": SPACE,
        "predict_trial": predict_trial,
    }
    return SurrogateSampler(**defaults | fields)


def test_posterior_equals_kernel_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((30, 4))
    values = features @ [0.3, -0.1, 0.0, 0.2] + 0.03 * generator.standard_normal(30)
    monkeypatch.setattr(module, "POSTERIOR_SAMPLES", 1)
    surrogate = LinearSurrogate(recipes(features), {"y": list(values)})
    scaled, centred = (features - features.mean(axis=0)) / features.std(axis=0), values - values.mean()
    scaled[:, 0] *= module.ERROR_FEATURE_SCALE
    likelihood = {
        (spread, noise): multivariate_normal(cov=noise**2 * np.eye(30) + spread**2 * scaled @ scaled.T).logpdf(centred)
        for spread in module.PRIOR_STDS
        for noise in module.NOISE_STDS
    }
    spread, noise = max(likelihood, key=lambda key: likelihood[key])
    assert noise == 0.03
    gram = scaled @ scaled.T  # the kernel form, which does not compute the weights
    expected = values.mean() + spread**2 * gram @ np.linalg.solve(noise**2 * np.eye(30) + spread**2 * gram, centred)
    samples = surrogate.sample_posterior(recipes(features), 4000, random.Random(0))["y"]
    assert samples.shape == (4000, 30)
    assert samples.mean(axis=0) == pytest.approx(expected, abs=2e-3)
    posterior = spread**2 * gram - spread**4 * gram @ np.linalg.solve(noise**2 * np.eye(30) + spread**2 * gram, gram)
    assert samples.std(axis=0) == pytest.approx(np.sqrt(np.diag(posterior)), rel=0.1)


@given(st.lists(st.floats(-1, 1) | st.none(), min_size=3, max_size=12))
def test_target_needs_two_observations(values: list[float | None]) -> None:
    features = np.random.default_rng(1).standard_normal((len(values), 3))
    surrogate = LinearSurrogate(recipes(features), {"y": values})
    observed = [n for n, value in enumerate(values) if value is not None]
    assert surrogate.modelled_targets == ({"y"} if len(observed) >= module.MIN_OBSERVATIONS else set())
    if surrogate.modelled_targets:
        assert np.isfinite(surrogate.sample_posterior(recipes(features), 3, random.Random(0))["y"]).all()


def test_best_recipe_is_found_in_fourteen_trials() -> None:
    rng = random.Random(0)
    space = [
        {"kind": kind, "size": size, "cut": cut / 16}
        for kind in ("a", "b", "c")
        for size in (1, 2, 4, 8)
        for cut in range(9)
    ]
    sampler = create_sampler(objectives=OBJECTIVES[1:])
    trials = [evaluated_trial(n, params) for n, params in enumerate(rng.sample(space, 6))]
    feasible = [params for params in space if (s := evaluated_trial(0, params).summary) and s.feasible]
    best = min(feasible, key=lambda params: true_metrics(params)[1])
    for number in range(6, 14):
        tried = [trial.params for trial in trials]
        params = sampler.propose(trials, [params for params in space if params not in tried], rng)
        if params is None:
            break
        trials.append(evaluated_trial(number, params))
    assert best in [trial.params for trial in trials]


def test_infeasible_candidates_are_not_proposed() -> None:
    trials = [evaluated_trial(n, {"kind": "b", "size": 8, "cut": cut / 20}) for n, cut in enumerate(range(10))]
    trials = [replace(trial, summary=evaluated_trial(0, trial.params).summary) for trial in trials]
    infeasible = [{"kind": "b", "size": 8, "cut": 0.5}, {"kind": "b", "size": 8, "cut": 0.49}]
    assert true_metrics(infeasible[1])[0] > LIMITS[0].absolute  # type: ignore[operator]
    assert create_sampler().propose(trials, infeasible, random.Random(0)) is None


def test_too_few_trials_give_no_proposal() -> None:
    candidates = [{"kind": "a", "size": 1, "cut": 0.1}]
    assert create_sampler().propose([], candidates, random.Random(0)) is None
    assert create_sampler().propose([evaluated_trial(0, candidates[0])], candidates, random.Random(0)) is None
    trials = [evaluated_trial(n, {"kind": "b", "size": 8, "cut": n / 20}) for n in range(5)]
    assert create_sampler().propose(trials, [], random.Random(0)) is None


def test_predicted_metric_is_modelled_by_its_ratio() -> None:
    recipe = RecipeFeatures(features=[1.0], predicted={DECODE: 2.0})
    summary = TrialSummary(metrics={DECODE: 3.0})
    assert module._log_metric(recipe, summary, DECODE) == pytest.approx(math.log(1.5))
    assert module._log_metric(recipe, summary, RATIO) is None


def test_partial_predictions_are_ignored() -> None:
    def predict_some(params: Params) -> Prediction:
        predictions = (predicted(DECODE, 0.01 * params["size"]),) if params["kind"] == "a" else ()
        prediction = predict_trial(params)
        return replace(prediction, result=replace(prediction.result, predictions=predictions))

    rng = random.Random(1)
    trials = [evaluated_trial(n, SPACE.sample(rng)) for n in range(12)]
    untried = [SPACE.sample(rng) for _ in range(50)]
    proposed = create_sampler().propose(trials, untried, random.Random(0))
    assert proposed is not None
    assert create_sampler(predict_trial=predict_some).propose(trials, untried, random.Random(0)) == proposed


@pytest.mark.parametrize("is_minimum", [False, True])
def test_limit_is_modelled_by_its_excess(is_minimum: bool) -> None:
    limit = replace(LIMITS[0], is_minimum=is_minimum)
    for excess, broken in ((0.2, True), (-0.2, False)):
        verdict = VerdictSummary(excess=excess, satisfied=not broken, predicted=False, bound=1.15)
        value = module._log_excess(TrialSummary(verdicts={limit.metric: verdict}), limit)
        assert value is not None
        assert (value > 0) == broken
    predicted = VerdictSummary(excess=0.2, satisfied=False, predicted=True, bound=1.15)
    assert module._log_excess(TrialSummary(verdicts={limit.metric: predicted}), limit) is None
