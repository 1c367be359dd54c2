"""Bytes on disk, peak memory and time of a token of an engine, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.model_spec import EMBEDDING, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target
from edgeopt.runtimes import sizes
from edgeopt.runtimes.genai.quantized_nodes import nodes

RUNTIME_BYTES = 57 * 2**20
"""Resident memory of Python, ONNX Runtime and an empty session, as measured with onnxruntime 1.32 on x86-64."""
BLOCK_BYTES = 10
"""Of each block beside its codes and zero-point in memory, more than on disk: its scale and a sum of its weights in
packed form and the scale again as it was read, all in fp32, in place of one in fp16."""
TOUCHED_BYTES = 16 * 2**20
"""Of an embedding that is mapped, what the rows for some texts take. A file that lies in huge pages takes more."""
ARENA = 2
"""What ONNX Runtime's memory for intermediate results takes of what they need, as it grows by doubling."""
GRAPH_BYTES, LAYER_BYTES, CONFIG_BYTES = 6_300, 5_490, 1_450
"""An empty graph, what each layer adds to it in fp32, and its config: names and shapes."""
NODE_BYTES: Mapping[str, int] = {"float": 590, "dynamic": 491, "static": 1_128}
"""What a matrix on a grid adds to the graph, by how its input is taken."""
ZERO_POINTS_BYTES, BIAS_BYTES, CAST_BYTES, KV_BYTES = 228, 418, 167, 430
"""What zero-points and a bias add for each matrix, a cast from fp16, and keys and values on a grid for each layer."""
BANDS: Mapping[str, float] = {"size/engine_mib": 0.002, "memory/peak_rss_mib": 0.08, "latency/decode_p50_ms": 0.3}
"""Half the width of the band around each prediction, as a share of it, below which a limit refuses a recipe."""
GRAPHS_BAND = 0.05
"""The same of the graphs, which are a good part of a very small engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted, never measured; every part in bytes.

    Attributes:
        weights: matrices of the layers, with their block scales and zero-points.
        tables: embedding and lm_head.
        packed: all these once more, where they are packed on disk.
        adapters: those that are not merged, of which each is loaded once a request chose it.
        graphs: that of generation and that of scoring, with configs.
        carried: the tokenizer and its settings.
        resident: of all these at run time: matrices in packed form, whose file is unmapped, and rows of the embedding.
        packing: the largest matrix that is held twice while the engine is loaded.
        kv_cache: keys and values at the context length.
        activations: the largest intermediate tensors of a chunk of a prompt, and the logits of one token.
    """

    weights: int
    tables: int
    packed: int
    adapters: int
    graphs: int
    carried: int
    kv_cache: int
    activations: int
    resident: int
    packing: int

    @property
    def disk_bytes(self) -> int:
        return self.weights + self.tables + self.packed + self.adapters + self.graphs + self.carried

    @property
    def peak_bytes(self) -> int:
        return RUNTIME_BYTES + self.resident + max(self.packing, self.kv_cache + self.activations)

    @property
    def on_disk(self) -> dict[str, int]:
        """The parts of the files, and their sum."""
        return self._named("weights", "tables", "packed", "adapters", "graphs", "carried", "disk_bytes")

    @property
    def in_memory(self) -> dict[str, int]:
        """The parts of the peak beside the runtime's own, and the peak."""
        return self._named("resident", "packing", "kv_cache", "activations", "peak_bytes")

    def _named(self, *names: str) -> dict[str, int]:
        return {name: getattr(self, name) for name in names}


def predictions(found: Estimate, spec: ModelSpec, target: Target) -> tuple[Measurement, ...]:
    """What will be measured of an engine of `spec`, each with the band by which limits are judged."""
    band = BANDS[sizes.SIZE_METRIC] * found.disk_bytes + GRAPHS_BAND * found.graphs
    if found.packed:
        band += sizes.prepacked_copy_error_bytes(spec)
    size = sizes.predict_size(found.disk_bytes, low_bytes=found.disk_bytes - band, high_bytes=found.disk_bytes + band)
    figures = [("memory/peak_rss_mib", "MiB", found.peak_bytes / 2**20)]
    if target.kernels is not None:
        figures.append(("latency/decode_p50_ms", "ms", target.kernels.decode_us(spec) / 1e3))
    return size, *(
        sizes.make_prediction_within(metric, unit, value, tolerance=BANDS[metric]) for metric, unit, value in figures
    )


def estimate(
    spec: ModelSpec, *, context_length: int, chunk_tokens: int, carried_bytes: int, packed_on_disk: bool = False
) -> Estimate:
    """Predict an engine of `spec` on the genai runtime.

    Args:
        context_length: tokens for which the key-value cache is allocated (fp32 on CPU, or the spec's grid).
        chunk_tokens: tokens of a prompt that are computed at once, which the activations grow with.
        carried_bytes: files that an engine takes over from its model, such as the tokenizer.
        packed_on_disk: the engine has its matrices in the layout of the kernels, too.
    """
    kept = sum(2 * layer.kv_heads * spec.head_size * context_length for layer in spec.layers)
    kv_cache = kept * (32 if spec.kv_cache is None else spec.kv_cache.bits) // 8
    widest = max(2 * layer.intermediate_size + layer.heads * spec.head_size for layer in spec.layers)
    adapters = sizes.adapters_bytes(spec)
    activations = 4 * (ARENA * chunk_tokens * (widest + 4 * spec.hidden_size) + spec.vocabulary_size)
    return Estimate(
        weights=sizes.decoder_bytes(spec),
        tables=sizes.embedding_and_lm_head_bytes(spec),
        packed=sizes.prepacked_copy_bytes(spec) if packed_on_disk else 0,
        adapters=adapters,
        graphs=graph_bytes(spec),
        carried=carried_bytes,
        kv_cache=kv_cache,
        activations=activations,
        resident=sum(resident_bytes(spec, name) for name in spec.matrices) + adapters,
        packing=max((resident_bytes(spec, name) for name in spec.matrices if name not in spec.schemes), default=0),
    )


def graph_bytes(spec: ModelSpec) -> int:
    """Bytes of both graphs, which differ by the rows of their logits, and of the config beside them."""
    one = GRAPH_BYTES + len(spec.layers) * (LAYER_BYTES + (KV_BYTES if spec.kv_cache else 0))
    for name, (rows, _) in spec.matrices.items():
        grid, count = spec.schemes.get(name), len(nodes(name, rows))
        if grid is not None:
            zero_points, bias = 0 if grid.symmetric else ZERO_POINTS_BYTES, BIAS_BYTES if grid.bias else 0
            one += count * (NODE_BYTES[grid.inputs] + zero_points + bias)
        elif spec.weight_dtype == "fp16":
            one += count * CAST_BYTES
    return 2 * one + CONFIG_BYTES


def resident_bytes(spec: ModelSpec, name: str) -> int:
    """Bytes of a unit at run time, where fp16 is widened to fp32; of tied tables each of the two uses has its own."""
    rows, columns = spec.matrices[name]
    grid = spec.schemes.get(name)
    if name == EMBEDDING and (grid is not None or spec.weight_dtype == "fp32"):
        return min(TOUCHED_BYTES, spec.size_bytes(name))
    if grid is None:
        return 4 * rows * columns
    return grid.size_bytes(rows, columns) + BLOCK_BYTES * rows * -(-columns // grid.block_size)
