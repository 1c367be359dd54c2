from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import specs
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.search.estimate import estimate, layer_bytes, lever, matrix_bytes, table_bytes
from edgeopt.spec import LayerSpec, ModelSpec, Quantization

INT4 = Quantization(bits=4, block_size=32, symmetric=True, method="rtn", lm_head_bits=8, embedding_bits=8)
SPEC = specs.llama(tied=False)


def packed(rows: int, columns: int, bits: int, block: int, symmetric: bool) -> int:
    """The tensors of MatMulNBits by their shapes in the operator's specification.

    B: uint8 (N, blocks, block · bits / 8); scales: float32 (N, blocks);
    zero_points: uint8 (N, ceil(blocks · bits / 8)), absent for symmetric weights.
    """
    blocks = len(range(0, columns, block))
    weights = np.empty((rows, blocks, block * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, (blocks * bits + 7) // 8), np.uint8)
    return weights.nbytes + scales.nbytes + (0 if symmetric else zeros.nbytes)


sides = st.integers(1, 300)


@given(
    rows=sides,
    columns=sides,
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
)
def test_a_matrix_takes_the_bytes_of_its_tensors(
    rows: int, columns: int, bits: int, block: int, symmetric: bool
) -> None:
    found = matrix_bytes(rows, columns, bits=bits, block_size=block, symmetric=symmetric)
    assert found == packed(rows, columns, bits, block, symmetric)


def test_an_fp32_engine_holds_four_bytes_a_parameter() -> None:
    found = estimate(SPEC, context_length=128, chunk_tokens=16, tokenizer_bytes=1000)
    assert found.weights + found.tables == 4 * SPEC.parameters
    half = estimate(replace(SPEC, weight_dtype="fp16"), context_length=128, chunk_tokens=16, tokenizer_bytes=1000)
    norms = 64 * (2 * len(SPEC.layers) + 1)
    assert half.weights + half.tables == 2 * (SPEC.parameters - norms) + 4 * norms


def test_the_cache_holds_keys_and_values_of_every_layer_in_fp32() -> None:
    layers = (
        LayerSpec(intermediate_size=128, heads=4, kv_heads=2),
        LayerSpec(intermediate_size=64, heads=2, kv_heads=1),
    )
    found = estimate(SPEC.with_layers(layers), context_length=100, chunk_tokens=1, tokenizer_bytes=0)
    assert found.kv_cache == 2 * 100 * 16 * (2 + 1) * 4


def test_a_tied_table_is_counted_once_where_it_is_stored_once() -> None:
    def tables(spec: ModelSpec) -> int:
        return estimate(spec, context_length=128, chunk_tokens=16, tokenizer_bytes=0).tables

    tied = replace(SPEC, tied_embeddings=True)
    assert tables(tied) * 2 == tables(SPEC)
    assert tables(replace(tied, quantization=INT4)) * 2 == tables(replace(SPEC, quantization=INT4))
    apart = replace(tied, quantization=replace(INT4, embedding_bits=32))
    assert tables(apart) == 300 * 64 * 4 + packed(300, 64, 8, 32, True)


def test_an_embedding_of_its_own_has_symmetric_blocks() -> None:
    asymmetric = replace(SPEC, quantization=replace(INT4, symmetric=False))
    assert table_bytes(asymmetric) == (packed(300, 64, 8, 32, True), packed(300, 64, 8, 32, False))


def test_fp16_is_computed_in_fp32() -> None:
    half, full = (
        estimate(replace(SPEC, weight_dtype=dtype), context_length=128, chunk_tokens=16, tokenizer_bytes=0)
        for dtype in ("fp16", "fp32")
    )
    assert half.disk_bytes < full.disk_bytes
    assert half.peak_bytes == full.peak_bytes


def test_fewer_bits_heads_channels_layers_and_tokens_are_never_more_bytes() -> None:
    def peak(spec: ModelSpec, tokens: int = 128) -> int:
        return estimate(spec, context_length=tokens, chunk_tokens=tokens, tokenizer_bytes=0).peak_bytes

    quantized = replace(SPEC, quantization=INT4)
    assert peak(quantized) < peak(replace(SPEC, quantization=replace(INT4, bits=8))) < peak(SPEC)
    assert peak(quantized.with_layers(quantized.layers[:1])) < peak(quantized)
    assert peak(quantized, 64) < peak(quantized, 128)
    for smaller in ({"intermediate_size": 96}, {"heads": 2}, {"kv_heads": 1}):
        assert layer_bytes(quantized, replace(SPEC.layers[0], **smaller)) < layer_bytes(quantized, SPEC.layers[0])


def test_the_parts_add_up() -> None:
    e = estimate(SPEC, context_length=128, chunk_tokens=16, tokenizer_bytes=1000)
    assert e.peak_bytes > e.resident + e.kv_cache + e.activations
    assert e.disk_bytes >= e.weights + e.tables + 1000
    assert e.parameters == SPEC.parameters
    assert e.tier == "tiny"


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        (None, "recipe=int8"),
        (replace(INT4, bits=8), "recipe=int4"),
        (replace(INT4, embedding_bits=32), "embedding=int8"),
        (INT4, "prune"),
        (replace(INT4, block_size=128), "smaller model"),
    ],
)
def test_there_is_always_a_next_lever(quantization: Quantization | None, told: str) -> None:
    assert told in lever(replace(SPEC, quantization=quantization))
