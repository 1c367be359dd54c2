from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from support import specs

from edgeopt.compress.pruning.prune_gradually import PruneGradually
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.quantization.gptq import Gptq
from edgeopt.compress.quantization.k_quant import KQuant
from edgeopt.compress.quantization.mixed_precision import MixedPrecision
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.compress.recovery.lora import Lora
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec, QuantizationScheme
from edgeopt.core.protocols import Step
from edgeopt.search import expected_error as module
from edgeopt.search.expected_error import added_error

MODEL = specs.llama()
LAYERS = [name for name in MODEL.matrices if name not in (LM_HEAD, EMBEDDING)]
NARROWER = PruneWidth(ratio=0.5, distribution="uniform", multiple=16)


def grid(bits: int, block_size: int = 32) -> QuantizationScheme:
    return QuantizationScheme(bits=bits, block_size=block_size, symmetric=True)


def rounded(grid: QuantizationScheme, names: list[str] = LAYERS) -> ModelSpec:
    return replace(MODEL, schemes=dict.fromkeys(names, grid))


def expected_error(steps: list[Step], original: ModelSpec) -> float:
    """That of steps which are planned one after another."""
    return module.expected_error(steps, list(accumulate(steps, lambda spec, step: step.plan(spec), initial=original)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_rounding_loses_what_normal_weights_lose(bits: int, block: int) -> None:
    weights = np.random.default_rng(bits * block).standard_normal((4000, block))
    step = 2 * np.abs(weights).max(axis=1, keepdims=True) / 2**bits
    lost = ((weights - np.round(weights / step) * step) ** 2).sum() / (weights**2).sum()
    found = added_error(MODEL, rounded(grid(bits, block), list(MODEL.matrices)))
    # the largest of B is somewhat smaller than its bound, and 2 bits round many weights to zero
    assert lost == pytest.approx(found, rel=0.5)
    assert found > 0.9 * lost


def test_removing_loses_what_the_least_important_channels_hold() -> None:
    importance = np.sort(np.random.default_rng(0).exponential(size=200_000))
    halved = importance[:100_000].sum() / importance.sum()
    whole = sum(math.prod(sides) for sides in MODEL.matrices.values())
    fed_forward = sum(math.prod(MODEL.matrices[name]) for name in LAYERS if name.endswith(("gate_up", "down")))
    found = added_error(MODEL, specs.llama(intermediate=64))
    assert found == pytest.approx(halved * fed_forward / whole, rel=0.01)
    assert added_error(specs.llama(intermediate=64), MODEL) == 0.0, "nothing is lost by adding"


def test_a_layer_that_is_removed_is_lost_whole() -> None:
    shorter = replace(MODEL, layers=MODEL.layers[:-1])
    gone = sum(math.prod(MODEL.matrices[name]) for name in MODEL.matrices if name not in shorter.matrices)
    assert gone
    assert added_error(MODEL, shorter) == pytest.approx(
        gone / sum(math.prod(sides) for sides in MODEL.matrices.values())
    )


def test_nothing_done_loses_nothing() -> None:
    assert expected_error([], MODEL) == 0.0
    assert expected_error([Lora()], MODEL) == 0.0
    assert expected_error([Quantize(weights="fp16", lm_head="float", embedding="float")], MODEL) == 0.0


def test_rounding_adds_up_over_matrices_and_never_loses_more_than_all() -> None:
    parts = [added_error(MODEL, rounded(grid(4), [name])) for name in LAYERS]
    assert added_error(MODEL, rounded(grid(4))) == pytest.approx(sum(parts))
    assert added_error(MODEL, rounded(grid(1, 1024), list(MODEL.matrices))) == pytest.approx(1.0)


def test_fewer_bits_and_longer_blocks_lose_more() -> None:
    of = [added_error(MODEL, rounded(grid(bits, block))) for bits, block in ((8, 32), (4, 32), (4, 64), (3, 32))]
    assert of == sorted(of)


def test_steps_add_up() -> None:
    rounding = Quantize(rounding=Rtn())
    both = expected_error([NARROWER, rounding], MODEL)
    narrow = NARROWER.plan(MODEL)
    assert both == pytest.approx(added_error(MODEL, narrow) + added_error(narrow, rounding.plan(narrow)))


def test_better_roundings_lose_less() -> None:
    nearest, searched, compensated = (
        expected_error([Quantize(rounding=how)], MODEL) for how in (Rtn(), KQuant(), Gptq())
    )
    assert compensated == pytest.approx(0.5 * nearest)
    assert compensated < searched < nearest


def test_training_makes_good_a_part_of_what_was_lost_before_it_alone() -> None:
    lost = expected_error([NARROWER], MODEL)
    assert expected_error([NARROWER, Lora()], MODEL) == pytest.approx(0.7 * lost)
    assert expected_error([Lora(), NARROWER], MODEL) == pytest.approx(lost)
    assert expected_error([PruneGradually(prune=NARROWER)], MODEL) == pytest.approx(0.7 * lost)


@pytest.mark.parametrize("step", [Quantize(), MixedPrecision()])
def test_what_was_rounded_once_is_not_lost_again(step: Step) -> None:
    spec = step.plan(MODEL)
    assert added_error(spec, spec) == 0.0
