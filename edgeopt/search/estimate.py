"""Bytes on disk and peak memory of a recipe by arithmetic alone, and the lever to pull when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeopt.spec import LayerSpec, ModelSpec

RUNTIME_BYTES = 64 * 2**20
"""Resident memory of Python, ONNX Runtime and an empty session, as measured with onnxruntime 1.32 on x86-64."""
GRAPH_BYTES = 3 * 2**16
"""The graph, its config and small files, for a few dozen nodes a layer."""
TIERS = ((100e6, "tiny"), (1e9, "small"), (7e9, "medium"), (float("inf"), "large"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted, never measured; every part in bytes.

    Attributes:
        weights: matrices of the layers, with their block scales and zero-points.
        tables: embedding and lm_head.
        resident: of the weights at run time: matrices in packed form, whose file is unmapped, and the mapped embedding.
        kv_cache: keys and values at the context length.
        activations: the largest intermediate tensors of a chunk of a prompt, and the logits of one token.
    """

    parameters: int
    tier: str
    weights: int
    tables: int
    tokenizer: int
    kv_cache: int
    activations: int
    resident: int

    @property
    def disk_bytes(self) -> int:
        return self.weights + self.tables + self.tokenizer + GRAPH_BYTES

    @property
    def peak_bytes(self) -> int:
        return RUNTIME_BYTES + self.resident + self.kv_cache + self.activations


def estimate(spec: ModelSpec, *, context_length: int, chunk_tokens: int, tokenizer_bytes: int) -> Estimate:
    """Predict an engine of `spec` on the genai runtime.

    Args:
        context_length: tokens for which the key-value cache is allocated (fp32 on CPU).
        chunk_tokens: tokens of a prompt that are computed at once, which the activations grow with.
    """
    weights, (embedding, lm_head) = weight_bytes(spec), table_bytes(spec)
    computed = replace(spec, weight_dtype="fp32")  # fp16 is a storage type
    kv_cache = sum(2 * layer.kv_heads * spec.head_size * context_length * 4 for layer in spec.layers)
    widest = max(2 * layer.intermediate_size + layer.heads * spec.head_size for layer in spec.layers)
    activations = 4 * (chunk_tokens * (widest + 4 * spec.hidden_size) + spec.vocabulary_size)
    return Estimate(
        parameters=spec.parameters,
        tier=next(name for bound, name in TIERS if spec.parameters < bound),
        weights=weights,
        tables=lm_head if spec.shares_tables else embedding + lm_head,
        tokenizer=tokenizer_bytes,
        kv_cache=kv_cache,
        activations=activations,
        resident=weight_bytes(computed) + sum(table_bytes(computed)),
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


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of all decoder layers and the last norm."""
    return sum(layer_bytes(spec, layer) for layer in spec.layers) + 4 * spec.hidden_size


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


def table_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Bytes of the embedding and of the lm_head; an embedding of its own has symmetric blocks."""
    q, rows, columns = spec.quantization, spec.vocabulary_size, spec.hidden_size
    if q is None:
        return rows * columns * _float_bytes(spec), rows * columns * _float_bytes(spec)

    def one(bits: int, symmetric: bool) -> int:
        if bits == 32:
            return rows * columns * 4
        return matrix_bytes(rows, columns, bits=bits, block_size=q.block_size, symmetric=symmetric)

    return one(q.embedding_bits, q.symmetric or not spec.shares_tables), one(q.lm_head_bits, q.symmetric)


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
