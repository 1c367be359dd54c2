from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import f_oneway

from edgeopt.search.pareto.param_importance import compute_importance

LEVELS = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-100, 100)), min_size=8, max_size=30)


@given(LEVELS)
def test_importance_follows_from_the_f_statistic(trials: list[tuple[str, float]]) -> None:
    values = [value for _, value in trials]
    groups = [[v for g, v in trials if g == level] for level in sorted({g for g, _ in trials})]
    importance = compute_importance([{"p": g} for g, _ in trials], values)["p"]
    assert 0 <= importance <= 1
    if len(groups) < 2 or max(values) - min(values) < 1e-3 or len(values) <= len(groups):
        return
    f = float(f_oneway(*groups).statistic)
    group_count, count = len(groups), len(values)
    if f < 1e6:
        expected = (group_count - 1) * (f - 1) / ((group_count - 1) * f + count - group_count)
        assert importance == pytest.approx(max(0.0, expected), abs=1e-6)


def test_influential_parameters_come_first() -> None:
    rng = random.Random(0)
    params = [{"bits": rng.choice([4, 8]), "ratio": rng.random(), "noise": rng.random()} for _ in range(200)]
    importance = compute_importance(params, [10.0 * p["bits"] + 30.0 * p["ratio"] for p in params])
    assert list(importance)[:2] == ["bits", "ratio"]
    assert importance["bits"] > 0.7
    assert importance["noise"] < 0.05


def test_inactive_parameter_is_a_group() -> None:
    params = [{"recipe": "a"}, {"recipe": "b", "ratio": 0.3}] * 5
    assert compute_importance(params, [1.0, 2.0] * 5)["ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]])
def test_constant_values_give_zero_importance(values: list[float]) -> None:
    importance = compute_importance([{"p": n % 2} for n in range(len(values))], values)
    assert set(importance.values()) <= {0.0}
