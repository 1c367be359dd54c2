"""Predict size, peak memory and decode latency of an engine from its spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.model_spec import EMBEDDING, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target
from edgeopt.runtimes import sizes
from edgeopt.runtimes.genai.quantized_nodes import node_rows

RUNTIME_BYTES = 57 * 2**20
"""Resident memory of Python, ONNX Runtime and an empty session, measured with onnxruntime 1.32 on x86-64."""
BLOCK_BYTES = 10
"""Bytes that a block takes more in memory than on disk. In memory it has three fp32 numbers: the prepacked scale, the
prepacked sum of its weights, and the scale as it was read. On disk it has one fp16 scale."""
MAPPED_EMBEDDING_BYTES = 16 * 2**20
"""Resident bytes of a mapped embedding: the rows that some texts use. A file in huge pages takes more."""
ARENA_FACTOR = 2
"""Ratio of ONNX Runtime's arena to the bytes it must hold, because the arena grows by doubling."""
GRAPH_BYTES, LAYER_BYTES, CONFIG_BYTES = 6_300, 5_490, 1_450
"""Bytes of an empty graph, of the names and shapes that a layer adds in fp32, and of the config."""
NODE_BYTES: Mapping[str, int] = {"float": 590, "dynamic": 491, "static": 1_128}
"""Bytes that a quantized matrix adds to the graph, by `QuantizationScheme.inputs`."""
ZERO_POINTS_BYTES, BIAS_BYTES, CAST_BYTES, KV_BYTES = 228, 418, 167, 430
"""Bytes that zero-points, a bias and a cast from fp16 add per matrix, and a quantized KV cache per layer."""
TOLERANCES: Mapping[str, float] = {"size/engine_mib": 0.002, "memory/peak_rss_mib": 0.08, "latency/decode_p50_ms": 0.3}
"""Relative error of each prediction. Limits are judged by the bounds that follow from it."""
GRAPHS_TOLERANCE = 0.05
"""Relative error of the graphs, which are a considerable part of a very small engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Predicted bytes of each part of an engine on disk and in memory.

    Attributes:
        weights: matrices of the layers, with their block scales and zero-points.
        embeddings: embedding and lm_head.
        packed: prepacked copy of the matrices, if it is stored on disk.
        adapters: adapters that are not merged. Each is loaded on its first request.
        graphs: graphs of generation and scoring, and the config.
        copied_files: files copied from the model, such as the tokenizer.
        resident: weights in memory: prepacked matrices, whose file is unmapped, the used rows of the embedding, and
            adapters.
        packing: largest matrix of which a second copy exists while the engine is loaded.
        kv_cache: keys and values at the context length.
        activations: largest intermediate tensors of a prompt chunk, and the logits of one token.
    """

    weights: int
    embeddings: int
    packed: int
    adapters: int
    graphs: int
    copied_files: int
    kv_cache: int
    activations: int
    resident: int
    packing: int

    @property
    def disk_bytes(self) -> int:
        """Return the size of all files."""
        return self.weights + self.embeddings + self.packed + self.adapters + self.graphs + self.copied_files

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory of a process that loads the engine and then generates."""
        return RUNTIME_BYTES + self.resident + max(self.packing, self.kv_cache + self.activations)

    @property
    def on_disk(self) -> dict[str, int]:
        """Return the parts of the files and their sum."""
        return self._select("weights", "embeddings", "packed", "adapters", "graphs", "copied_files", "disk_bytes")

    @property
    def in_memory(self) -> dict[str, int]:
        """Return the parts of the peak memory, without RUNTIME_BYTES, and the peak."""
        return self._select("resident", "packing", "kv_cache", "activations", "peak_bytes")

    def _select(self, *names: str) -> dict[str, int]:
        return {name: getattr(self, name) for name in names}


def predict_metrics(engine: EngineSizes, spec: ModelSpec, target: Target) -> tuple[Measurement, ...]:
    """Return the predicted metrics of an engine of `spec`. Latency needs kernel times of the target."""
    error_bytes = TOLERANCES[sizes.SIZE_METRIC] * engine.disk_bytes + GRAPHS_TOLERANCE * engine.graphs
    if engine.packed:
        error_bytes += sizes.prepacked_copy_error_bytes(spec)
    disk_bytes = engine.disk_bytes
    size = sizes.predict_size(disk_bytes, low_bytes=disk_bytes - error_bytes, high_bytes=disk_bytes + error_bytes)
    predictions = [("memory/peak_rss_mib", "MiB", engine.peak_bytes / 2**20)]
    if target.kernels is not None:
        predictions.append(("latency/decode_p50_ms", "ms", target.kernels.decode_us(spec) / 1e3))
    return size, *(
        sizes.make_prediction_within(metric, unit, value, tolerance=TOLERANCES[metric])
        for metric, unit, value in predictions
    )


def predict_sizes(
    spec: ModelSpec, *, context_length: int, chunk_tokens: int, copied_bytes: int, packed_on_disk: bool = False
) -> EngineSizes:
    """Return the predicted bytes of an engine of `spec`.

    Args:
        context_length: capacity of the key-value cache in tokens. It is fp32, or quantized as in the spec.
        chunk_tokens: prompt tokens computed at once. Activations grow with them.
        copied_bytes: files copied from the model, such as the tokenizer.
        packed_on_disk: the engine contains a prepacked copy of its matrices.
    """
    cached_values = sum(2 * layer.kv_heads * spec.head_size * context_length for layer in spec.layers)
    kv_cache = cached_values * (32 if spec.kv_cache is None else spec.kv_cache.bits) // 8
    widest_layer = max(2 * layer.intermediate_size + layer.heads * spec.head_size for layer in spec.layers)
    adapters = sizes.adapters_bytes(spec)
    activations = 4 * (ARENA_FACTOR * chunk_tokens * (widest_layer + 4 * spec.hidden_size) + spec.vocabulary_size)
    return EngineSizes(
        weights=sizes.decoder_bytes(spec),
        embeddings=sizes.embedding_and_lm_head_bytes(spec),
        packed=sizes.prepacked_copy_bytes(spec) if packed_on_disk else 0,
        adapters=adapters,
        graphs=graph_bytes(spec),
        copied_files=copied_bytes,
        kv_cache=kv_cache,
        activations=activations,
        resident=sum(resident_bytes(spec, name) for name in spec.matrices) + adapters,
        packing=max((resident_bytes(spec, name) for name in spec.matrices if name not in spec.schemes), default=0),
    )


def graph_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the config and both graphs, which differ only in the rows of their logits."""
    graph = GRAPH_BYTES + len(spec.layers) * (LAYER_BYTES + (KV_BYTES if spec.kv_cache else 0))
    for name, (rows, _) in spec.matrices.items():
        scheme, count = spec.schemes.get(name), len(node_rows(name, rows))
        if scheme is not None:
            zero_points, bias = 0 if scheme.symmetric else ZERO_POINTS_BYTES, BIAS_BYTES if scheme.bias else 0
            graph += count * (NODE_BYTES[scheme.inputs] + zero_points + bias)
        elif spec.weight_dtype == "fp16":
            graph += count * CAST_BYTES
    return 2 * graph + CONFIG_BYTES


def resident_bytes(spec: ModelSpec, name: str) -> int:
    """Return the bytes of a unit in memory, where fp16 becomes fp32 and tied tables have one copy for each use."""
    rows, columns = spec.matrices[name]
    scheme = spec.schemes.get(name)
    if name == EMBEDDING and (scheme is not None or spec.weight_dtype == "fp32"):
        return min(MAPPED_EMBEDDING_BYTES, spec.size_bytes(name))
    if scheme is None:
        return 4 * rows * columns
    return scheme.size_bytes(rows, columns) + BLOCK_BYTES * rows * -(-columns // scheme.block_size)
