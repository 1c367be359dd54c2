"""Bytes on disk and peak memory of a recipe by arithmetic alone, and the lever to pull when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.spec import LayerSpec, ModelSpec

RUNTIME_BYTES = 48 * 2**20
"""Resident memory of Python and ONNX Runtime before an engine is loaded (measured: see memory/bare_rss_mib)."""
GRAPH_BYTES = 3 * 2**16
"""The graph, its config and small files, for a few dozen nodes a layer."""
TIERS = ((100e6, "tiny"), (1e9, "small"), (7e9, "medium"), (float("inf"), "large"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted, never measured; every part in bytes.

    Attributes:
        weights: matrices of the layers, with their block scales and zero-points.
        tables: embedding and lm_head.
        unpacked: what the runtime copies in memory beside the mapped file.
        kv_cache: keys and values at the context length.
        activations: the largest intermediate tensors of a prompt, logits included.
    """

    parameters: int
    tier: str
    weights: int
    tables: int
    tokenizer: int
    kv_cache: int
    activations: int
    unpacked: int

    @property
    def disk_bytes(self) -> int:
        return self.weights + self.tables + self.tokenizer + GRAPH_BYTES

    @property
    def peak_bytes(self) -> int:
        return self.disk_bytes + self.unpacked + self.kv_cache + self.activations + RUNTIME_BYTES


def estimate(spec: ModelSpec, *, context_length: int, prompt_length: int, tokenizer_bytes: int) -> Estimate:
    """Predict an engine of `spec` on the genai runtime.

    Args:
        context_length: tokens for which the key-value cache is allocated (fp32 on CPU).
        prompt_length: tokens of the longest prompt, which the activations grow with.
    """
    weights = sum(layer_bytes(spec, layer) for layer in spec.layers) + 4 * spec.hidden_size
    tables = table_bytes(spec)
    kv_cache = sum(2 * layer.kv_heads * spec.head_size * context_length * 4 for layer in spec.layers)
    widest = max(2 * layer.intermediate_size + layer.heads * spec.head_size for layer in spec.layers)
    activations = 4 * prompt_length * (spec.vocabulary_size + widest + 4 * spec.hidden_size)
    return Estimate(
        parameters=spec.parameters,
        tier=next(name for bound, name in TIERS if spec.parameters < bound),
        weights=weights,
        tables=tables,
        tokenizer=tokenizer_bytes,
        kv_cache=kv_cache,
        activations=activations,
        unpacked=weights + tables,
    )


def matrix_bytes(rows: int, columns: int, *, bits: int, block_size: int, symmetric: bool) -> int:
    """Bytes of one matrix in MatMulNBits layout: packed weights, fp32 scales and packed zero-points.

    Args:
        rows, columns: output and input channels; blocks run along the input.
    """
    blocks = -(-columns // block_size)
    packed = rows * blocks * block_size * bits // 8
    zero_points = 0 if symmetric else rows * -(-blocks * bits // 8)
    return packed + 4 * rows * blocks + zero_points


def layer_bytes(spec: ModelSpec, layer: LayerSpec) -> int:
    """Bytes of one decoder layer with its two norms."""
    attention, key_value = layer.heads * spec.head_size, layer.kv_heads * spec.head_size
    shapes = [
        (attention + 2 * key_value, spec.hidden_size),
        (spec.hidden_size, attention),
        (2 * layer.intermediate_size, spec.hidden_size),
        (spec.hidden_size, layer.intermediate_size),
    ]
    norms = 2 * 4 * spec.hidden_size
    q = spec.quantization
    if q is None:
        return norms + sum(rows * columns for rows, columns in shapes) * _float_bytes(spec)
    return norms + sum(
        matrix_bytes(rows, columns, bits=q.bits, block_size=q.block_size, symmetric=q.symmetric)
        for rows, columns in shapes
    )


def table_bytes(spec: ModelSpec) -> int:
    """Bytes of embedding and lm_head, counted once where they are stored once."""
    q = spec.quantization
    if q is None:
        return spec.vocabulary_size * spec.hidden_size * _float_bytes(spec) * (1 if spec.tied_embeddings else 2)

    def one(bits: int) -> int:
        if bits == 32:
            return spec.vocabulary_size * spec.hidden_size * 4
        return matrix_bytes(
            spec.vocabulary_size, spec.hidden_size, bits=bits, block_size=q.block_size, symmetric=q.symmetric
        )

    shared = spec.tied_embeddings and q.embedding_bits == q.lm_head_bits
    return one(q.lm_head_bits) if shared else one(q.lm_head_bits) + one(q.embedding_bits)


def lever(spec: ModelSpec) -> str:
    """What to try next when an engine does not fit: quantize, then prune, then distil."""
    q = spec.quantization
    if q is None:
        return "quantize: recipe=int8 or recipe=int4 divides the weights by 4 or 7"
    if q.bits > 4:
        return "quantize further: recipe=int4"
    if q.embedding_bits == 32:
        return "quantize the tables: step.quantize.embedding=int8 step.quantize.lm_head=int8"
    if q.block_size < 128:
        return "prune: recipe=prune_lora_int4, or larger blocks: step.quantize.block_size=128"
    return "prune (recipe=prune_lora_int4 or depth_lora_int4), then take a smaller model and distil into it"


def _float_bytes(spec: ModelSpec) -> int:
    return 2 if spec.weight_dtype == "fp16" else 4
