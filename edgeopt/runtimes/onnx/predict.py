"""Size, and the time of a token where a part of the weights is read from storage for each, by arithmetic alone."""

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

DECODE = "latency/decode_p50_ms"
BAND = 0.3
"""Half the width of the band around a predicted time, as a share of it, below which a limit refuses a recipe."""
GATED = ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Mistral", "Phi3", "Granite", "SmolLM3", "Olmo2")
"""Families of which a spec knows every matrix; others have MLPs of two, or tables of positions."""
LAYER_BYTES, NODE_BYTES = 4_900, 700
"""What a layer takes in the graph, and what a matrix on a grid adds: names and shapes."""


def predictions(
    spec: ModelSpec, runtime: PortableOnnx, target: Target, *, carried_bytes: int
) -> tuple[Measurement, ...]:
    """What will be measured of an engine; what is not known of it is left out."""
    return *_size(spec, runtime, carried_bytes), *_decode(spec, runtime, target.device)


def _size(spec: ModelSpec, runtime: PortableOnnx, carried_bytes: int) -> Iterator[Measurement]:
    """Of all files, where the graph depends on what the exporter makes of a family."""
    if spec.architecture.removesuffix("ForCausalLM") not in GATED:
        return
    weights = sizes.decoder_bytes(spec) + sizes.embedding_and_lm_head_bytes(spec)
    packed = runtime.packed_on_disk
    yield sizes.predict_size_from_weights(
        spec,
        weights + (sizes.prepacked_copy_bytes(spec) if packed else 0),
        weights_error_bytes=sizes.prepacked_copy_error_bytes(spec) if packed else 0.0,
        metadata_bytes=LAYER_BYTES * len(spec.layers) + NODE_BYTES * len(spec.schemes),
        max_metadata_factor=3,
        carried_bytes=carried_bytes,
    )


def _decode(spec: ModelSpec, runtime: PortableOnnx, device: Device | None) -> Iterator[Measurement]:
    """Where storage is what bounds a token; nothing where that is not known."""
    if device is None or not device.storage_gb_per_s:
        return
    value = streamed_bytes(spec, runtime) / device.storage_gb_per_s / 1e6
    if value:
        method = f"bytes that a token reads from storage, at {device.storage_gb_per_s:g} GB/s"
        yield sizes.make_prediction_within(DECODE, "ms", value, tolerance=BAND, method=method)


def streamed_bytes(spec: ModelSpec, runtime: PortableOnnx) -> int:
    """Bytes of weights that are read from storage for a token: all but as many whole shards as the budget holds.

    Nothing where all stay, or all but one shard, which has to be in memory to compute; and nothing where a token
    computes longer than it reads: weights on a grid that are not packed.
    """
    budget_bytes = runtime.resident_bytes
    if budget_bytes is None or runtime.processes > 1 or (spec.schemes and not runtime.packed_on_disk):
        return 0
    size = prepacked_bytes if runtime.packed_on_disk else ModelSpec.size_bytes
    sizes = [size(spec, name) for name in spec.matrices if name != EMBEDDING]
    shard = sum(sizes) / runtime.shards
    streamed = round(sum(sizes) - budget_bytes // shard * shard)
    return streamed if streamed > max(shard, *sizes) else 0
