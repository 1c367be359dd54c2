"""Test the predicted sizes of genai engines against hand-computed values."""

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


def quantize(
    bits: int, block_size: int = 32, *, spec: ModelSpec = SPEC, float_units: tuple[str, ...] = ()
) -> ModelSpec:
    """Return `spec` with every matrix quantized alike, except those named in `float_units`."""
    scheme = QuantizationScheme(bits=bits, block_size=block_size, symmetric=True)
    return replace(spec, schemes={name: scheme for name in spec.matrices if name not in float_units})


def test_fp32_engine_has_four_bytes_per_parameter() -> None:
    sizes = predict_sizes(SPEC, context_length=128, chunk_tokens=16, copied_bytes=1000)
    assert sizes.weights + sizes.embeddings == 4 * SPEC.parameters
    fp16 = predict_sizes(replace(SPEC, weight_dtype="fp16"), context_length=128, chunk_tokens=16, copied_bytes=1000)
    norms = 64 * (2 * len(SPEC.layers) + 1)
    assert fp16.weights + fp16.embeddings == 2 * (SPEC.parameters - norms) + 4 * norms


def test_kv_cache_counts_every_layer_in_fp32() -> None:
    layers = (
        LayerSpec(intermediate_size=128, heads=4, kv_heads=2),
        LayerSpec(intermediate_size=64, heads=2, kv_heads=1),
    )
    sizes = predict_sizes(SPEC.with_layers(layers), context_length=100, chunk_tokens=1, copied_bytes=0)
    assert sizes.kv_cache == 2 * 100 * 16 * (2 + 1) * 4


def test_tied_table_counts_once() -> None:
    def embeddings(spec: ModelSpec) -> int:
        return predict_sizes(spec, context_length=128, chunk_tokens=16, copied_bytes=0).embeddings

    tied = replace(SPEC, tied_embeddings=True)
    assert embeddings(tied) * 2 == embeddings(SPEC)
    assert embeddings(quantize(8, spec=tied)) * 2 == embeddings(quantize(8))
    assert embeddings(quantize(8, float_units=("embedding",))) == 300 * 64 * 4 + 300 * (64 + 2 * 2)


def test_adapters_count_on_disk_and_in_memory() -> None:
    adapter = Adapter(rank=4, targets=("o_proj",))
    without_adapters, with_adapters = (
        predict_sizes(spec, context_length=128, chunk_tokens=16, copied_bytes=0)
        for spec in (SPEC, replace(SPEC, adapters={"a": adapter, "b": adapter}))
    )
    added = 2 * len(SPEC.layers) * 4 * 4 * (64 + 64)
    assert with_adapters.disk_bytes - without_adapters.disk_bytes == added
    assert with_adapters.peak_bytes - without_adapters.peak_bytes == added


def test_block_overhead_in_memory_is_three_floats() -> None:
    sizes = predict_sizes(quantize(4), context_length=128, chunk_tokens=16, copied_bytes=0)
    blocks = sum(rows * columns // 32 for name, (rows, columns) in SPEC.matrices.items() if name != "embedding")
    norms = 4 * 64 * (2 * len(SPEC.layers) + 1)
    assert sizes.resident == sizes.weights + sizes.embeddings - norms + (3 * 4 - 2) * blocks


def test_mapped_embedding_is_resident_in_part() -> None:
    wide, wider = (replace(SPEC, vocabulary_size=size) for size in (200_000, 400_000))

    def resident(spec: ModelSpec) -> int:
        return predict_sizes(spec, context_length=128, chunk_tokens=16, copied_bytes=0).resident

    head = 200_000 * 64
    assert (
        resident(quantize(8, spec=wider)) - resident(quantize(8, spec=wide))
        == head + 12 * head // 32 + 2**24 - head * 34 // 32
    )
    assert resident(wider) - resident(wide) == 4 * head, "the resident part of an fp32 embedding has a fixed size"
    fp16, wider_fp16 = (replace(spec, weight_dtype="fp16") for spec in (wide, wider))
    assert resident(wider_fp16) - resident(fp16) == 2 * 4 * head, "an fp16 embedding is converted to fp32 completely"


def test_loading_copies_largest_float_matrix() -> None:
    wide = replace(SPEC, vocabulary_size=20_000)
    sizes = predict_sizes(wide, context_length=8, chunk_tokens=1, copied_bytes=0)
    assert sizes.packing == 4 * 20_000 * 64 > sizes.kv_cache + sizes.activations
    quantized = predict_sizes(quantize(8, spec=wide), context_length=8, chunk_tokens=1, copied_bytes=0)
    assert quantized.packing == 0, "quantized matrices are split"
    assert sizes.peak_bytes - sizes.resident == quantized.peak_bytes - quantized.resident + sizes.packing - (
        quantized.kv_cache + quantized.activations
    )


def test_fp16_weights_need_fp32_memory() -> None:
    fp16, fp32 = (
        predict_sizes(replace(SPEC, weight_dtype=dtype), context_length=128, chunk_tokens=16, copied_bytes=0)
        for dtype in ("fp16", "fp32")
    )
    assert fp16.disk_bytes < fp32.disk_bytes
    assert fp16.peak_bytes == fp32.peak_bytes


def test_smaller_model_needs_less_memory() -> None:
    def peak(spec: ModelSpec, tokens: int = 128) -> int:
        return predict_sizes(spec, context_length=tokens, chunk_tokens=tokens, copied_bytes=0).peak_bytes

    assert peak(quantize(4)) < peak(quantize(8)) < peak(SPEC)
    shallower = SPEC.with_layers(SPEC.layers[:1])
    assert peak(quantize(4, spec=shallower)) < peak(quantize(4))
    assert peak(quantize(4), 64) < peak(quantize(4), 128)
    for smaller in ({"intermediate_size": 96}, {"heads": 2}, {"kv_heads": 1}):
        pruned = SPEC.with_layers((replace(SPEC.layers[0], **smaller), *SPEC.layers[1:]))
        assert peak(quantize(4, spec=pruned)) < peak(quantize(4))


def test_parts_sum_to_totals() -> None:
    sizes = predict_sizes(SPEC, context_length=128, chunk_tokens=16, copied_bytes=1000)
    assert sizes.peak_bytes > sizes.resident + max(sizes.packing, sizes.kv_cache + sizes.activations)
    assert sizes.disk_bytes >= sizes.weights + sizes.embeddings + 1000


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SPEC, "recipe=int8"),
        (quantize(8), "recipe=int4"),
        (quantize(4, float_units=("embedding",)), "embedding=int8"),
        (quantize(4), "prune"),
        (quantize(4, block_size=128), "smaller model"),
    ],
)
def test_every_model_gets_a_next_step(spec: ModelSpec, expected: str) -> None:
    assert expected in suggest_next_step(spec)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsity_saves_no_bytes(pattern: Literal["unstructured", "2:4"]) -> None:
    sparse = Sparsify(pattern=pattern).plan(SPEC)
    assert sparse != SPEC
    options = {"context_length": 128, "chunk_tokens": 16, "copied_bytes": 0}
    assert predict_sizes(sparse, **options) == predict_sizes(SPEC, **options)
