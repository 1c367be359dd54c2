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


def scheme(bits: int, block_size: int = 32) -> QuantizationScheme:
    return QuantizationScheme(bits=bits, block_size=block_size, symmetric=True)


def quantized(scheme: QuantizationScheme, names: list[str] = LAYERS) -> ModelSpec:
    return replace(MODEL, schemes=dict.fromkeys(names, scheme))


def expected_error(steps: list[Step], original: ModelSpec) -> float:
    """Return the expected error of steps that are planned in order."""
    return module.expected_error(steps, list(accumulate(steps, lambda spec, step: step.plan(spec), initial=original)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_rounding_error_matches_normal_weights(bits: int, block: int) -> None:
    weights = np.random.default_rng(bits * block).standard_normal((4000, block))
    step = 2 * np.abs(weights).max(axis=1, keepdims=True) / 2**bits
    lost = ((weights - np.round(weights / step) * step) ** 2).sum() / (weights**2).sum()
    error = added_error(MODEL, quantized(scheme(bits, block), list(MODEL.matrices)))
    # the largest of B weights is smaller than its bound, and 2 bits round many weights to zero
    assert lost == pytest.approx(error, rel=0.5)
    assert error > 0.9 * lost


def test_pruning_error_matches_exponential_importance() -> None:
    importance = np.sort(np.random.default_rng(0).exponential(size=200_000))
    pruned_share = importance[:100_000].sum() / importance.sum()
    total = sum(math.prod(shape) for shape in MODEL.matrices.values())
    feed_forward = sum(math.prod(MODEL.matrices[name]) for name in LAYERS if name.endswith(("gate_up", "down")))
    error = added_error(MODEL, specs.llama(intermediate=64))
    assert error == pytest.approx(pruned_share * feed_forward / total, rel=0.01)
    assert added_error(specs.llama(intermediate=64), MODEL) == 0.0, "added channels lose nothing"


def test_removed_layer_is_lost_completely() -> None:
    shorter = replace(MODEL, layers=MODEL.layers[:-1])
    removed = sum(math.prod(MODEL.matrices[name]) for name in MODEL.matrices if name not in shorter.matrices)
    assert removed
    total = sum(math.prod(shape) for shape in MODEL.matrices.values())
    assert added_error(MODEL, shorter) == pytest.approx(removed / total)


def test_identity_steps_lose_nothing() -> None:
    assert expected_error([], MODEL) == 0.0
    assert expected_error([Lora()], MODEL) == 0.0
    assert expected_error([Quantize(weights="fp16", lm_head="float", embedding="float")], MODEL) == 0.0


def test_rounding_error_adds_up_to_at_most_one() -> None:
    parts = [added_error(MODEL, quantized(scheme(4), [name])) for name in LAYERS]
    assert added_error(MODEL, quantized(scheme(4))) == pytest.approx(sum(parts))
    assert added_error(MODEL, quantized(scheme(1, 1024), list(MODEL.matrices))) == pytest.approx(1.0)


def test_fewer_bits_and_longer_blocks_lose_more() -> None:
    formats = ((8, 32), (4, 32), (4, 64), (3, 32))
    errors = [added_error(MODEL, quantized(scheme(bits, block))) for bits, block in formats]
    assert errors == sorted(errors)


def test_errors_of_steps_add_up() -> None:
    rounding = Quantize(rounding=Rtn())
    both = expected_error([NARROWER, rounding], MODEL)
    narrow = NARROWER.plan(MODEL)
    assert both == pytest.approx(added_error(MODEL, narrow) + added_error(narrow, rounding.plan(narrow)))


def test_better_rounding_loses_less() -> None:
    nearest, searched, compensated = (
        expected_error([Quantize(rounding=rounding)], MODEL) for rounding in (Rtn(), KQuant(), Gptq())
    )
    assert compensated == pytest.approx(0.5 * nearest)
    assert compensated < searched < nearest


def test_training_reduces_the_error_of_earlier_steps() -> None:
    lost = expected_error([NARROWER], MODEL)
    assert expected_error([NARROWER, Lora()], MODEL) == pytest.approx(0.7 * lost)
    assert expected_error([Lora(), NARROWER], MODEL) == pytest.approx(lost)
    assert expected_error([PruneGradually(prune=NARROWER)], MODEL) == pytest.approx(0.7 * lost)


@pytest.mark.parametrize("step", [Quantize(), MixedPrecision()])
def test_quantized_matrices_lose_nothing_more(step: Step) -> None:
    spec = step.plan(MODEL)
    assert added_error(spec, spec) == 0.0
