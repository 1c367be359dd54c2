from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import specs

from edgeopt.search.forecast import ESTIMATE, damage
from edgeopt.spec import EMBEDDING, LM_HEAD, Grid
from edgeopt.target import Limit
from search.studies import DECODE, FAILED, LIMITS, RATIO, RSS, SIZE, forecast, predicted

MODEL = specs.llama()
LAYERS = [name for name in MODEL.matrices if name not in (LM_HEAD, EMBEDDING)]


def grid(bits: int, block_size: int = 32) -> Grid:
    return Grid(bits=bits, block_size=block_size, symmetric=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_damage_of_rounding_is_that_of_normal_weights(bits: int, block: int) -> None:
    weights = np.random.default_rng(bits * block).standard_normal((4000, block))
    step = 2 * np.abs(weights).max(axis=1, keepdims=True) / 2**bits
    lost = ((weights - np.round(weights / step) * step) ** 2).sum() / (weights**2).sum()
    everything = replace(MODEL, grids=dict.fromkeys(MODEL.matrices, grid(bits, block)))
    # the largest of B is somewhat smaller than its bound, and 2 bits round many weights to zero
    assert lost == pytest.approx(damage(MODEL, everything), rel=0.5)
    assert damage(MODEL, everything) > 0.9 * lost


def test_nothing_done_does_no_damage() -> None:
    assert damage(MODEL, MODEL) == 0.0
    assert damage(MODEL, replace(MODEL, weight_dtype="fp16")) == 0.0


def test_what_is_removed_is_lost_whole() -> None:
    half = specs.llama(intermediate=64)
    whole = sum(math.prod(sides) for sides in MODEL.matrices.values())
    assert damage(MODEL, half) == pytest.approx(2 * 3 * 64 * 64 / whole)
    assert damage(half, MODEL) == 0.0, "nothing is lost by adding"


def test_damage_adds_up_over_matrices_and_never_exceeds_all() -> None:
    parts = [damage(MODEL, replace(MODEL, grids={name: grid(4)})) for name in LAYERS]
    assert damage(MODEL, replace(MODEL, grids=dict.fromkeys(LAYERS, grid(4)))) == pytest.approx(sum(parts))
    assert damage(MODEL, replace(MODEL, grids=dict.fromkeys(MODEL.matrices, grid(1, 1024)))) == pytest.approx(1.0)


def test_fewer_bits_and_longer_blocks_do_more_damage() -> None:
    def of(bits: int, block: int) -> float:
        return damage(MODEL, replace(MODEL, grids=dict.fromkeys(LAYERS, grid(bits, block))))

    assert of(8, 32) < of(4, 32) < of(4, 64) < of(3, 32)


# refusals


def test_a_recipe_that_keeps_all_limits_as_far_as_is_known_is_not_refused() -> None:
    assert forecast(size=1.0, rss=90.0).refused(LIMITS, {}) is None
    assert forecast().refused(LIMITS, {}) is None


def test_a_recipe_that_breaks_a_limit_is_refused_with_all_verdicts() -> None:
    result = forecast(rss=180.0).refused(LIMITS, {})
    assert result is not None
    assert result.refused == ESTIMATE
    assert not result.feasible
    held = {v.metric: v for v in result.verdicts}
    assert held[RSS].excess == pytest.approx(1.0)
    assert held[RSS].predicted
    assert (held[RATIO].excess, held[DECODE].excess) == (None, None)
    assert result.predictions == (predicted(RSS, 180.0),)


@pytest.mark.parametrize(("bounds", "refused"), [({}, False), ({RSS: 100.0}, True), ({RSS: 200.0}, False)])
def test_a_relative_limit_holds_as_soon_as_its_bound_is_known(bounds: dict[str, float], refused: bool) -> None:
    limits = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    assert (forecast(rss=150.0).refused(limits, bounds) is not None) == refused


def test_only_the_best_that_a_prediction_allows_for_is_held_against_a_limit() -> None:
    made = forecast(rss=150.0)
    hoped = replace(made.result, predictions=(replace(predicted(RSS, 150.0), low=80.0, high=300.0),))
    assert replace(made, result=hoped).refused(LIMITS, {}) is None
    least = (Limit(metric=RSS, unit="MiB", absolute=250.0, least=True),)
    assert replace(made, result=hoped).refused(least, {}) is None
    assert made.refused(least, {}) is not None


def test_a_recipe_that_cannot_be_planned_is_its_own_failed_result() -> None:
    made = forecast(failure=FAILED)
    assert made.refused((), {}) == made.result
    assert made.result.failure == FAILED


def test_figures_are_the_predicted_values() -> None:
    assert forecast(size=3.0, rss=70.0).figures == {SIZE: 3.0, RSS: 70.0}
