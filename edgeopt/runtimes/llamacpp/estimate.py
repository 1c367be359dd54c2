"""Bytes of a GGUF engine, by arithmetic alone. Blocks of Q4_0, Q4_1 and Q8_0 are as in ggml-common.h."""

from __future__ import annotations

from edgeopt.result import Measurement
from edgeopt.runtimes import sizes
from edgeopt.spec import EMBEDDING, LLAMA_BITS, LM_HEAD, ModelSpec

TOKEN_BYTES, TENSOR_BYTES = 44, 80
"""What a token takes in the header with its merge, and a tensor with its name, shape and alignment."""
MIXTURE = 0.25
"""By how much of its size a model differs from what a mixture of types is said to take: more of it lies in tables."""


def size(spec: ModelSpec, *, carried_bytes: int) -> Measurement:
    """Of all files. The header's share depends on the tokenizer, so that no limit is broken by it alone."""
    weights = sizes.weight_bytes(spec) + _table_bytes(spec) + sum(_minima_bytes(spec, name) for name in _stored(spec))
    others = carried_bytes + sum(map(spec.adapter_bytes, spec.adapters))
    header = TOKEN_BYTES * spec.vocabulary_size + TENSOR_BYTES * len(spec.matrices)
    unsure = MIXTURE * weights if spec.weight_dtype in LLAMA_BITS else 0.0
    return sizes.size(
        weights + header + others,
        low_bytes=weights - unsure + others,
        high_bytes=weights + unsure + 2 * header + others,
    )


def _stored(spec: ModelSpec) -> list[str]:
    """The matrices in the file: of tied tables the embedding alone."""
    return [name for name in spec.matrices if not (spec.tied_embeddings and name == LM_HEAD)]


def _table_bytes(spec: ModelSpec) -> int:
    return sum(spec.size_bytes(name) for name in _stored(spec) if name in (LM_HEAD, EMBEDDING))


def _minima_bytes(spec: ModelSpec, name: str) -> int:
    """What Q4_1 takes beyond edgeopt's grid: a minimum in fp16 for each block in place of a zero-point in 4 bits."""
    grid = spec.grids.get(name)
    if grid is None or grid.symmetric:
        return 0
    rows, columns = spec.matrices[name]
    return rows * -(-columns // grid.block_size) * 3 // 2
