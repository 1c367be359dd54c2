"""Bytes of a GGUF engine, by arithmetic alone. Blocks of Q4_0, Q4_1 and Q8_0 are as in ggml-common.h."""

from __future__ import annotations

from edgeopt.core.model_spec import LLAMA_BITS, LM_HEAD, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.runtimes import sizes

TOKEN_BYTES, TENSOR_BYTES = 44, 80
"""What a token takes in the header with its merge, and a tensor with its name, shape and alignment."""
MIXTURE = 0.25
"""By how much of its size a model differs from what a mixture of types is said to take: more of it lies in tables."""


def size(spec: ModelSpec, *, carried_bytes: int) -> Measurement:
    """Of all files, where the header's share depends on the tokenizer."""
    weights = sizes.weight_bytes(spec) + sizes.table_bytes(spec) + _minima_bytes(spec)
    return sizes.size_of(
        spec,
        weights,
        unsure_bytes=MIXTURE * weights if spec.weight_dtype in LLAMA_BITS else 0.0,
        names_bytes=TOKEN_BYTES * spec.vocabulary_size + TENSOR_BYTES * len(spec.matrices),
        times=2,
        carried_bytes=carried_bytes,
    )


def _minima_bytes(spec: ModelSpec) -> int:
    """What Q4_1 takes beyond edgeopt's grid: a minimum in fp16 for each block in place of a zero-point in 4 bits."""
    stored = {name: grid for name, grid in spec.schemes.items() if not (spec.tied_embeddings and name == LM_HEAD)}
    shapes = {name: spec.matrices[name] for name, grid in stored.items() if not grid.symmetric}
    return sum(rows * -(-columns // stored[name].block_size) for name, (rows, columns) in shapes.items()) * 3 // 2
