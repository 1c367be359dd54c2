from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from support import specs

from edgeopt.compress.pruning.sparsify import Sparsify
from edgeopt.core.model_spec import Adapter, LayerSpec, ModelSpec, QuantizationScheme
from edgeopt.pipeline.next_steps import suggest_next_step
from edgeopt.runtimes.genai.predict import predict_sizes

SPEC = specs.llama(tied=False)


def on(bits: int, block_size: int = 32, *, spec: ModelSpec = SPEC, but: tuple[str, ...] = ()) -> ModelSpec:
    """`spec` with every matrix on one grid, those named in `but` left in float."""
    grid = QuantizationScheme(bits=bits, block_size=block_size, symmetric=True)
    return replace(spec, schemes={name: grid for name in spec.matrices if name not in but})


def test_an_fp32_engine_holds_four_bytes_a_parameter() -> None:
    found = predict_sizes(SPEC, context_length=128, chunk_tokens=16, carried_bytes=1000)
    assert found.weights + found.tables == 4 * SPEC.parameters
    half = predict_sizes(replace(SPEC, weight_dtype="fp16"), context_length=128, chunk_tokens=16, carried_bytes=1000)
    norms = 64 * (2 * len(SPEC.layers) + 1)
    assert half.weights + half.tables == 2 * (SPEC.parameters - norms) + 4 * norms


def test_the_cache_holds_keys_and_values_of_every_layer_in_fp32() -> None:
    layers = (
        LayerSpec(intermediate_size=128, heads=4, kv_heads=2),
        LayerSpec(intermediate_size=64, heads=2, kv_heads=1),
    )
    found = predict_sizes(SPEC.with_layers(layers), context_length=100, chunk_tokens=1, carried_bytes=0)
    assert found.kv_cache == 2 * 100 * 16 * (2 + 1) * 4


def test_a_tied_table_is_counted_once_where_it_is_stored_once() -> None:
    def tables(spec: ModelSpec) -> int:
        return predict_sizes(spec, context_length=128, chunk_tokens=16, carried_bytes=0).tables

    tied = replace(SPEC, tied_embeddings=True)
    assert tables(tied) * 2 == tables(SPEC)
    assert tables(on(8, spec=tied)) * 2 == tables(on(8))
    assert tables(on(8, but=("embedding",))) == 300 * 64 * 4 + 300 * (64 + 2 * 2)


def test_adapters_count_on_disk_and_in_memory() -> None:
    adapter = Adapter(rank=4, targets=("o_proj",))
    bare, found = (
        predict_sizes(spec, context_length=128, chunk_tokens=16, carried_bytes=0)
        for spec in (SPEC, replace(SPEC, adapters={"a": adapter, "b": adapter}))
    )
    added = 2 * len(SPEC.layers) * 4 * 4 * (64 + 64)
    assert found.disk_bytes - bare.disk_bytes == found.peak_bytes - bare.peak_bytes == added


def test_a_block_has_three_floats_in_memory_where_it_has_half_of_one_on_disk() -> None:
    found = predict_sizes(on(4), context_length=128, chunk_tokens=16, carried_bytes=0)
    packed = sum(rows * columns // 32 for name, (rows, columns) in SPEC.matrices.items() if name != "embedding")
    norms = 4 * 64 * (2 * len(SPEC.layers) + 1)
    assert found.resident == found.weights + found.tables - norms + (3 * 4 - 2) * packed


def test_of_a_large_mapped_embedding_the_rows_of_some_texts_are_resident() -> None:
    wide, wider = (replace(SPEC, vocabulary_size=size) for size in (200_000, 400_000))

    def resident(spec: ModelSpec) -> int:
        return predict_sizes(spec, context_length=128, chunk_tokens=16, carried_bytes=0).resident

    head = 200_000 * 64
    assert resident(on(8, spec=wider)) - resident(on(8, spec=wide)) == head + 12 * head // 32 + 2**24 - head * 34 // 32
    assert resident(wider) - resident(wide) == 4 * head, "of an fp32 embedding as many bytes are resident in both"
    half, halves = (replace(spec, weight_dtype="fp16") for spec in (wide, wider))
    assert resident(halves) - resident(half) == 2 * 4 * head, "fp16 is widened whole"


def test_the_largest_float_matrix_is_held_twice_while_an_engine_is_loaded() -> None:
    wide = replace(SPEC, vocabulary_size=20_000)
    found = predict_sizes(wide, context_length=8, chunk_tokens=1, carried_bytes=0)
    assert found.packing == 4 * 20_000 * 64 > found.kv_cache + found.activations
    rounded = predict_sizes(on(8, spec=wide), context_length=8, chunk_tokens=1, carried_bytes=0)
    assert rounded.packing == 0, "on a grid it is split"
    assert found.peak_bytes - found.resident == rounded.peak_bytes - rounded.resident + found.packing - (
        rounded.kv_cache + rounded.activations
    )


def test_fp16_is_computed_in_fp32() -> None:
    half, full = (
        predict_sizes(replace(SPEC, weight_dtype=dtype), context_length=128, chunk_tokens=16, carried_bytes=0)
        for dtype in ("fp16", "fp32")
    )
    assert half.disk_bytes < full.disk_bytes
    assert half.peak_bytes == full.peak_bytes


def test_fewer_bits_heads_channels_layers_and_tokens_are_never_more_bytes() -> None:
    def peak(spec: ModelSpec, tokens: int = 128) -> int:
        return predict_sizes(spec, context_length=tokens, chunk_tokens=tokens, carried_bytes=0).peak_bytes

    assert peak(on(4)) < peak(on(8)) < peak(SPEC)
    shorter = SPEC.with_layers(SPEC.layers[:1])
    assert peak(on(4, spec=shorter)) < peak(on(4))
    assert peak(on(4), 64) < peak(on(4), 128)
    for smaller in ({"intermediate_size": 96}, {"heads": 2}, {"kv_heads": 1}):
        cut = SPEC.with_layers((replace(SPEC.layers[0], **smaller), *SPEC.layers[1:]))
        assert peak(on(4, spec=cut)) < peak(on(4))


def test_the_parts_add_up() -> None:
    e = predict_sizes(SPEC, context_length=128, chunk_tokens=16, carried_bytes=1000)
    assert e.peak_bytes > e.resident + max(e.packing, e.kv_cache + e.activations)
    assert e.disk_bytes >= e.weights + e.tables + 1000


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (SPEC, "recipe=int8"),
        (on(8), "recipe=int4"),
        (on(4, but=("embedding",)), "embedding=int8"),
        (on(4), "prune"),
        (on(4, block_size=128), "smaller model"),
    ],
)
def test_there_is_always_a_next_lever(spec: ModelSpec, told: str) -> None:
    assert told in suggest_next_step(spec)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_save_neither_bytes_nor_memory(pattern: Literal["unstructured", "2:4"]) -> None:
    sparse = Sparsify(pattern=pattern).plan(SPEC)
    assert sparse != SPEC
    sizes = {"context_length": 128, "chunk_tokens": 16, "carried_bytes": 0}
    assert predict_sizes(sparse, **sizes) == predict_sizes(SPEC, **sizes)
