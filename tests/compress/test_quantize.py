"""Test that Quantize plans a scheme for every unit and rejects schemes without a kernel."""

import pytest
from support import specs

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.model_spec import QuantizationScheme
from edgeopt.errors import ConfigError

SPEC = specs.llama(vocabulary=512, hidden=256, intermediate=704, heads=8, kv_heads=4, head_size=32, context=512)


def test_block_size_must_divide_matrix_side():
    with pytest.raises(ConfigError, match=r"must divide the matrix side 704, got 128.*16, 32, 64"):
        Quantize(block_size=128).plan(SPEC)


def test_two_bits_require_a_supported_block_size():
    with pytest.raises(ConfigError, match=r"no runtime has a fast kernel for 2 bits in blocks of 16.*32, 64"):
        Quantize(weights="int2", block_size=16).plan(SPEC)
    assert Quantize(weights="int4", block_size=16).plan(SPEC).schemes


def test_unsupported_block_size_is_rejected():
    with pytest.raises(ConfigError, match=r"`block_size` must be one of 16, 32, 64, 128, 256; got 48"):
        Quantize(block_size=48)


def test_schemes_follow_the_data_types():
    schemes = Quantize(weights="int4", block_size=64, lm_head="int8", embedding="float").plan(SPEC).schemes
    assert (
        schemes["layers.0.qkv"]
        == schemes["layers.1.down"]
        == QuantizationScheme(bits=4, block_size=64, symmetric=False)
    )
    assert schemes["lm_head"].bits == 8
    assert "embedding" not in schemes


def test_last_matching_override_wins():
    step = Quantize(overrides={"layers.0.*": "int8", "*.qkv": "int2", "layers.1.down": "float"})
    schemes = step.plan(SPEC).schemes
    bits = {name: scheme.bits for name, scheme in schemes.items()}
    assert (bits["layers.0.qkv"], bits["layers.1.qkv"]) == (2, 2)
    assert (bits["layers.0.down"], bits["layers.1.o"]) == (8, 4)
    assert "layers.1.down" not in bits


def test_embeddings_with_equal_types_stay_tied():
    assert Quantize(lm_head="int8", embedding="int8").plan(SPEC).tied_embeddings
    assert not Quantize(lm_head="int8", embedding="int4").plan(SPEC).tied_embeddings
    assert not Quantize(lm_head="int8", embedding="float").plan(SPEC).tied_embeddings


@pytest.mark.parametrize("weights", ["fp16", "fp32"])
def test_float_types_leave_weights_unquantized(weights):
    after = Quantize(weights=weights).plan(SPEC)
    assert not after.schemes
    assert after.weight_dtype == weights
