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
from support.studies import DECODE, LIMITS, RATIO, finished_row, predicted

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


def recipes(rows: np.ndarray) -> list[RecipeFeatures]:
    return [RecipeFeatures(features=list(row), predicted={}) for row in rows]


def predict_trial(params: Params) -> Prediction:
    result = TrialResult(recipe={}, target="t", device={}, emulated=False)
    return Prediction(result=result, expected_error=params["cut"])


def truth(params: Params) -> tuple[float, float]:
    """Ratio and decode time: each choice has its own effect on their logarithms."""
    kind = {"a": 0.1, "b": 0.0, "c": 0.05}[params["kind"]]
    return math.exp(kind + 0.3 * params["cut"]), math.exp(-0.3 * params["cut"] - 0.05 * math.log2(params["size"]))


def evaluated(number: int, params: Params) -> Trial:
    ratio, decode = truth(params)
    figures = {RATIO: ratio, DECODE: decode}
    verdicts = {}
    for limit in LIMITS[:2]:
        assert limit.absolute is not None
        excess = figures[limit.metric] / limit.absolute - 1
        verdicts[limit.metric] = VerdictSummary(
            excess=excess, satisfied=excess <= 0, predicted=False, bound=limit.absolute
        )
    kept = all(held.satisfied for held in verdicts.values())
    return finished_row(number, params, TrialSummary(feasible=kept, metrics=figures, verdicts=verdicts))


def guide(**more: Any) -> SurrogateSampler:
    known: dict[str, Any] = {
        "objectives": OBJECTIVES,
        "limits": LIMITS[:2],
        "space": SPACE,
        "predict_trial": predict_trial,
    }
    return SurrogateSampler(**known | more)


def test_weights_are_those_of_ridge_regression_and_the_noise_is_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((30, 4))
    values = rows @ [0.3, -0.1, 0.0, 0.2] + 0.03 * generator.standard_normal(30)
    monkeypatch.setattr(module, "POSTERIOR_SAMPLES", 1)
    made = LinearSurrogate(recipes(rows), {"y": list(values)})
    scaled, centred = (rows - rows.mean(axis=0)) / rows.std(axis=0), values - values.mean()
    scaled[:, 0] *= module.ERROR_FEATURE_SCALE
    likelihood = {
        (spread, noise): multivariate_normal(cov=noise**2 * np.eye(30) + spread**2 * scaled @ scaled.T).logpdf(centred)
        for spread in module.PRIOR_STDS
        for noise in module.NOISE_STDS
    }
    spread, noise = max(likelihood, key=lambda key: likelihood[key])
    assert noise == 0.03
    gram = scaled @ scaled.T  # in the form of kernels, which never sees the weights
    expected = values.mean() + spread**2 * gram @ np.linalg.solve(noise**2 * np.eye(30) + spread**2 * gram, centred)
    drawn = made.sample_posterior(recipes(rows), 4000, random.Random(0))["y"]
    assert drawn.shape == (4000, 30)
    assert drawn.mean(axis=0) == pytest.approx(expected, abs=2e-3)
    posterior = spread**2 * gram - spread**4 * gram @ np.linalg.solve(noise**2 * np.eye(30) + spread**2 * gram, gram)
    assert drawn.std(axis=0) == pytest.approx(np.sqrt(np.diag(posterior)), rel=0.1)


@given(st.lists(st.floats(-1, 1) | st.none(), min_size=3, max_size=12))
def test_what_is_not_known_teaches_nothing_and_too_little_models_nothing(values: list[float | None]) -> None:
    rows = np.random.default_rng(1).standard_normal((len(values), 3))
    made = LinearSurrogate(recipes(rows), {"y": values})
    known = [n for n, value in enumerate(values) if value is not None]
    assert made.modelled_targets == ({"y"} if len(known) >= module.MIN_OBSERVATIONS else set())
    if made.modelled_targets:
        assert np.isfinite(made.sample_posterior(recipes(rows), 3, random.Random(0))["y"]).all()


def test_a_dozen_trials_suffice_to_find_the_best_of_a_hundred_recipes() -> None:
    chance = random.Random(0)
    every = [
        {"kind": kind, "size": size, "cut": cut / 16}
        for kind in ("a", "b", "c")
        for size in (1, 2, 4, 8)
        for cut in range(9)
    ]
    one = guide(objectives=OBJECTIVES[1:])
    rows = [evaluated(n, params) for n, params in enumerate(chance.sample(every, 6))]
    best = min((p for p in every if (r := evaluated(0, p).summary) and r.feasible), key=lambda p: truth(p)[1])
    for number in range(6, 14):
        tried = [row.params for row in rows]
        params = one.propose(rows, [p for p in every if p not in tried], chance)
        if params is None:
            break
        rows.append(evaluated(number, params))
    assert best in [row.params for row in rows]


def test_of_recipes_that_would_break_a_limit_none_is_proposed() -> None:
    rows = [evaluated(n, {"kind": "b", "size": 8, "cut": cut / 20}) for n, cut in enumerate(range(10))]
    rows = [replace(row, summary=evaluated(0, row.params).summary) for row in rows]
    breaking = [{"kind": "b", "size": 8, "cut": 0.5}, {"kind": "b", "size": 8, "cut": 0.49}]
    assert truth(breaking[1])[0] > LIMITS[0].absolute  # type: ignore[operator]
    assert guide().propose(rows, breaking, random.Random(0)) is None


def test_nothing_is_proposed_while_too_little_is_known() -> None:
    some = [{"kind": "a", "size": 1, "cut": 0.1}]
    assert guide().propose([], some, random.Random(0)) is None
    assert guide().propose([evaluated(0, some[0])], some, random.Random(0)) is None
    rows = [evaluated(n, {"kind": "b", "size": 8, "cut": n / 20}) for n in range(5)]
    assert guide().propose(rows, [], random.Random(0)) is None


def test_what_arithmetic_predicts_is_modelled_by_its_ratio() -> None:
    recipe = RecipeFeatures(features=[1.0], predicted={DECODE: 2.0})
    summary = TrialSummary(metrics={DECODE: 3.0})
    assert module._log_metric(recipe, summary, DECODE) == pytest.approx(math.log(1.5))
    assert module._log_metric(recipe, summary, RATIO) is None


def test_what_arithmetic_predicts_of_some_recipes_alone_is_modelled_as_if_it_predicted_nothing() -> None:
    def some(params: Params) -> Prediction:
        known = (predicted(DECODE, 0.01 * params["size"]),) if params["kind"] == "a" else ()
        forecast = predict_trial(params)
        return replace(forecast, result=replace(forecast.result, predictions=known))

    chance = random.Random(1)
    rows = [evaluated(n, SPACE.sample(chance)) for n in range(12)]
    left = [SPACE.sample(chance) for _ in range(50)]
    proposed = guide().propose(rows, left, random.Random(0))
    assert proposed is not None
    assert guide(predict_trial=some).propose(rows, left, random.Random(0)) == proposed


@pytest.mark.parametrize("is_minimum", [False, True])
def test_a_limit_is_modelled_by_the_worse_end_of_the_interval(is_minimum: bool) -> None:
    limit = replace(LIMITS[0], is_minimum=is_minimum)
    for excess, broken in ((0.2, True), (-0.2, False)):
        held = VerdictSummary(excess=excess, satisfied=not broken, predicted=False, bound=1.15)
        value = module._log_excess(TrialSummary(verdicts={limit.metric: held}), limit)
        assert value is not None
        assert (value > 0) == broken
    predicted = VerdictSummary(excess=0.2, satisfied=False, predicted=True, bound=1.15)
    assert module._log_excess(TrialSummary(verdicts={limit.metric: predicted}), limit) is None
