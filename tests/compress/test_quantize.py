"""Quantization is planned by arithmetic, and what no engine could hold is refused."""

import pytest
import specs

from edgeopt.compress.quantize import Quantize
from edgeopt.errors import ConfigError

SPEC = specs.llama(vocabulary=512, hidden=256, intermediate=704, heads=8, kv_heads=4, head_size=32, context=512)


def test_a_block_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"does not divide the matrix side 704.*16, 32, 64"):
        Quantize(block_size=128).plan(SPEC)


def test_a_block_size_that_no_kernel_knows_is_refused():
    with pytest.raises(ConfigError, match="is no block size"):
        Quantize(block_size=48)


def test_the_method_decides_symmetry_where_it_is_left_open():
    assert Quantize(method="rtn").plan(SPEC).quantization.symmetric
    assert not Quantize(method="k_quant").plan(SPEC).quantization.symmetric
    assert not Quantize(method="rtn", symmetric=False).plan(SPEC).quantization.symmetric


def test_symmetric_k_quant_does_not_exist():
    with pytest.raises(ConfigError, match="zero-points"):
        Quantize(method="k_quant", symmetric=True)


@pytest.mark.parametrize("weights", ["fp16", "fp32"])
def test_float_types_leave_weights_unquantized(weights):
    after = Quantize(weights=weights).plan(SPEC)
    assert after.quantization is None
    assert after.weight_dtype == weights
