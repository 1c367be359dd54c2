"""Predict an engine's size, and its decode latency when weights are streamed from storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgeopt.core.model_spec import EMBEDDING, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.runtimes import sizes
from edgeopt.runtimes.onnxruntime_common.prepacked_weights import prepacked_bytes

if TYPE_CHECKING:
    from edgeopt.core.target import Device, Target
    from edgeopt.runtimes.onnx.runtime import PortableOnnx

DECODE_METRIC = "latency/decode_p50_ms"
DECODE_TOLERANCE = 0.3
"""Relative half-width of the interval around a predicted latency. A limit below the interval rejects the recipe."""
GATED_FAMILIES = (
    "Llama",
    "Qwen2",
    "Qwen3",
    "Gemma2",
    "Gemma3",
    "Mistral",
    "Phi3",
    "Granite",
    "SmolLM3",
    "Olmo2",
)
"""Families with gated MLPs, whose spec lists every matrix. Others have two-matrix MLPs or position embeddings."""
LAYER_BYTES, SCHEME_BYTES = 4_900, 700
"""Bytes of names and shapes in the graph for each layer, and for each quantized unit."""


def predict(spec: ModelSpec, runtime: PortableOnnx, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
    """Return the metrics of an engine that can be predicted by arithmetic."""
    return *_predict_size(spec, runtime, copied_bytes), *_predict_decode(spec, runtime, target.device)


def _predict_size(spec: ModelSpec, runtime: PortableOnnx, copied_bytes: int) -> Iterator[Measurement]:
    """Yield the size of all files if the spec lists every matrix of the family."""
    if spec.architecture.removesuffix("ForCausalLM") not in GATED_FAMILIES:
        return
    weights = sizes.decoder_bytes(spec) + sizes.embedding_and_lm_head_bytes(spec)
    packed = runtime.packed_on_disk
    yield sizes.predict_size_from_weights(
        spec,
        weights + (sizes.prepacked_copy_bytes(spec) if packed else 0),
        weights_error_bytes=sizes.prepacked_copy_error_bytes(spec) if packed else 0.0,
        metadata_bytes=LAYER_BYTES * len(spec.layers) + SCHEME_BYTES * len(spec.schemes),
        max_metadata_factor=3,
        copied_bytes=copied_bytes,
    )


def _predict_decode(spec: ModelSpec, runtime: PortableOnnx, device: Device | None) -> Iterator[Measurement]:
    """Yield the decode latency if the engine reads weights from storage of known bandwidth."""
    if device is None or not device.storage_gb_per_s:
        return
    latency_ms = streamed_bytes(spec, runtime) / device.storage_gb_per_s / 1e6
    if latency_ms:
        method = f"bytes read from storage per token, at {device.storage_gb_per_s:g} GB/s"
        yield sizes.make_prediction_within(DECODE_METRIC, "ms", latency_ms, tolerance=DECODE_TOLERANCE, method=method)


def streamed_bytes(spec: ModelSpec, runtime: PortableOnnx) -> int:
    """Return the bytes of weights that are read from storage per token: the shards that exceed the memory budget.

    Return 0 if only one shard exceeds it, because that shard stays in memory after its use. Return 0 for quantized
    weights that are not packed on disk, because computing a token takes longer than reading them.
    """
    budget_bytes = runtime.resident_bytes
    if budget_bytes is None or runtime.processes > 1 or (spec.schemes and not runtime.packed_on_disk):
        return 0
    unit_bytes = prepacked_bytes if runtime.packed_on_disk else ModelSpec.size_bytes
    matrix_sizes = [unit_bytes(spec, name) for name in spec.matrices if name != EMBEDDING]
    shard_bytes = sum(matrix_sizes) / runtime.shards
    streamed = round(sum(matrix_sizes) - budget_bytes // shard_bytes * shard_bytes)
    return streamed if streamed > max(shard_bytes, *matrix_sizes) else 0
