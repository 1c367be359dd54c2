"""Check that predicted decode times are sums of measured times and grow with sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import specs

from edgeopt.core.config_objects import instantiate
from edgeopt.core.kernel_times import MATRIX_SIDES, WORKING_SET_BYTES, KernelTimes, matrix_kind
from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError


def table(times: tuple[float, ...], *factors: float) -> tuple[tuple[float, ...], ...]:
    """Return one row for each factor: all times in µs multiplied by it."""
    return tuple(tuple(us * factor for us in times) for factor in factors)


SPEC = specs.llama(hidden=128, intermediate=256, vocabulary=512, tied=False)
KERNELS = KernelTimes(
    threads=2,
    matrix={
        "fp32": table((1.0, 4.0, 16.0, 64.0), 1.0, 1.1, 1.2, 1.6, 2.0, 4.0),
        "int4/32": table((1.0, 2.0, 4.0, 8.0), 1.0, 1.0, 1.5, 2.0, 2.0, 3.0),
        "int8/static": table((2.0, 4.0, 8.0, 16.0), 1.0, 1.0, 1.0, 2.0, 2.0, 3.0),
    },
    layer=(10.0, 100.0, 500.0),
    token=(3.0, 2.0),
)
INT4 = QuantizationScheme(bits=4, block_size=32, symmetric=True)


def quantized(scheme: QuantizationScheme) -> ModelSpec:
    return replace(SPEC, schemes=dict.fromkeys(SPEC.matrices, scheme))


def test_non_matrix_time_counts_layers_heads_and_vocabulary() -> None:
    heads = SPEC.layers[0].heads
    assert KERNELS.non_matrix_us(SPEC) == pytest.approx(2 * (10 + 0.1 * 128 + 0.5 * heads) + 3 + 0.002 * 512)


def test_timed_size_takes_measured_time() -> None:
    for side, us in zip(MATRIX_SIDES, (1.0, 2.0, 4.0, 8.0), strict=True):
        square = specs.llama(hidden=side, intermediate=side, heads=side // 16, kv_heads=0)
        assert KERNELS.unit_us(square, "layers.0.down", INT4, 1) == pytest.approx(us)
        assert KERNELS.unit_us(square, "layers.0.gate_up", INT4, 1) == pytest.approx(2 * us), "two products"


def test_larger_matrix_scales_with_weights() -> None:
    large = specs.llama(hidden=2048, intermediate=4096)
    assert KERNELS.unit_us(large, "layers.0.down", INT4, 1) == pytest.approx(8.0 * 8)


def test_time_grows_with_working_set() -> None:
    wide = specs.llama(hidden=1024, intermediate=1024)
    for size, factor in zip(WORKING_SET_BYTES, (1.0, 1.0, 1.5, 2.0, 2.0, 3.0), strict=True):
        assert KERNELS.unit_us(wide, "layers.0.down", INT4, size) == pytest.approx(8 * factor)
    between = math.sqrt(WORKING_SET_BYTES[2] * WORKING_SET_BYTES[3])
    assert KERNELS.unit_us(wide, "layers.0.down", INT4, between) == pytest.approx(8 * 1.75)
    assert KERNELS.unit_us(wide, "layers.0.down", INT4, 2**40) == pytest.approx(8 * 3.0)


def test_decode_time_sums_units_without_embedding() -> None:
    spec = quantized(INT4)
    weights = sum(math.prod(sides) for name, sides in spec.matrices.items() if name != "embedding")
    read_bytes = weights * (4 / 8 + 8 / 32)  # codes, and a scale and a sum for each block
    units_us = [KERNELS.unit_us(spec, name, INT4, read_bytes) for name in spec.matrices if name != "embedding"]
    assert KERNELS.decode_us(spec) == pytest.approx(KERNELS.non_matrix_us(spec) + sum(units_us))


def test_fp16_is_computed_in_fp32() -> None:
    assert KERNELS.decode_us(replace(SPEC, weight_dtype="fp16")) == KERNELS.decode_us(SPEC)


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(1, 64), st.integers(1, 64))
def test_time_is_monotonic_in_bytes_and_weights(one: float, other: float, few: int, many: int) -> None:
    low, high = sorted((one, other))
    small, large = (specs.llama(hidden=64, intermediate=16 * size) for size in sorted((few, many)))
    assert KERNELS.unit_us(small, "layers.0.down", INT4, low) <= KERNELS.unit_us(large, "layers.0.down", INT4, high)


def test_matrix_kind_names_bits_blocks_and_inputs() -> None:
    assert matrix_kind(None) == "fp32"
    assert matrix_kind(INT4) == "int4/32"
    assert matrix_kind(QuantizationScheme(bits=8, block_size=704, symmetric=True, inputs="static")) == "int8/static"


def test_missing_matrix_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="must include times of int2/64 matrices, got fp32, int4/32, int8/static"):
        KERNELS.decode_us(quantized(QuantizationScheme(bits=2, block_size=64, symmetric=True)))


def test_table_of_wrong_shape_is_rejected() -> None:
    with pytest.raises(ConfigError, match="must have 6 rows of 4 times, got rows of 2 times"):
        KernelTimes(threads=2, matrix={"fp32": ((1.0, 2.0),)}, layer=(0.0, 0.0, 0.0), token=(0.0, 0.0))


def test_outdated_kernel_times_are_rejected() -> None:
    config = {
        "_target_": "edgeopt.core.kernel_times.KernelTimes",
        "threads": 2,
        "matrix": {},
        "layer": [1.0, 2.0],
        "token": [3, 4],
    }
    with pytest.raises(ConfigError, match=r"target\.kernels.*`layer` must have 3 times.*got 2 and 2.*edgeopt profile"):
        instantiate(config, "target.kernels")
