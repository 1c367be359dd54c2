"""Quantization is planned by arithmetic, and what no engine could hold is refused."""

import pytest
from support import specs

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.model_spec import QuantizationScheme
from edgeopt.errors import ConfigError

SPEC = specs.llama(vocabulary=512, hidden=256, intermediate=704, heads=8, kv_heads=4, head_size=32, context=512)


def test_a_block_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"does not divide the matrix side 704.*16, 32, 64"):
        Quantize(block_size=128).plan(SPEC)


def test_two_bits_are_refused_in_blocks_that_no_fast_kernel_knows():
    with pytest.raises(ConfigError, match=r"no fast kernel for 2 bits in blocks of 16.*32, 64"):
        Quantize(weights="int2", block_size=16).plan(SPEC)
    assert Quantize(weights="int4", block_size=16).plan(SPEC).schemes


def test_a_block_size_that_no_kernel_knows_is_refused():
    with pytest.raises(ConfigError, match="is no block size"):
        Quantize(block_size=48)


def test_every_matrix_gets_the_grid_of_its_type():
    schemes = Quantize(weights="int4", block_size=64, lm_head="int8", embedding="float").plan(SPEC).schemes
    assert (
        schemes["layers.0.qkv"]
        == schemes["layers.1.down"]
        == QuantizationScheme(bits=4, block_size=64, symmetric=False)
    )
    assert schemes["lm_head"].bits == 8
    assert "embedding" not in schemes


def test_the_last_pattern_that_matches_decides():
    step = Quantize(overrides={"layers.0.*": "int8", "*.qkv": "int2", "layers.1.down": "float"})
    schemes = step.plan(SPEC).schemes
    bits = {name: grid.bits for name, grid in schemes.items()}
    assert (bits["layers.0.qkv"], bits["layers.1.qkv"]) == (2, 2)
    assert (bits["layers.0.down"], bits["layers.1.o"]) == (8, 4)
    assert "layers.1.down" not in bits


def test_tied_tables_stay_one_where_they_are_rounded_alike():
    assert Quantize(lm_head="int8", embedding="int8").plan(SPEC).tied_embeddings
    assert not Quantize(lm_head="int8", embedding="int4").plan(SPEC).tied_embeddings
    assert not Quantize(lm_head="int8", embedding="float").plan(SPEC).tied_embeddings


@pytest.mark.parametrize("weights", ["fp16", "fp32"])
def test_float_types_leave_weights_unquantized(weights):
    after = Quantize(weights=weights).plan(SPEC)
    assert not after.schemes
    assert after.weight_dtype == weights
