"""Predict the size of a GGUF engine by arithmetic. Block layouts of Q4_0, Q4_1 and Q8_0 are as in ggml-common.h."""

from __future__ import annotations

from edgeopt.core.model_spec import LLAMA_CPP_BITS, LM_HEAD, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.runtimes import sizes

TOKEN_BYTES, TENSOR_BYTES = 44, 80
"""Header bytes of one token with its merge, and of one tensor with its name, shape and alignment."""
MIXED_TYPES_ERROR = 0.25
"""Relative error of a size under mixed types: LLAMA_BITS hold for 7B models, smaller ones have larger tables."""


def size(spec: ModelSpec, *, copied_bytes: int) -> Measurement:
    """Return the predicted size of all engine files in MiB. The size of the header depends on the tokenizer."""
    weight_bytes = sizes.decoder_bytes(spec) + sizes.embedding_and_lm_head_bytes(spec) + _block_minimum_bytes(spec)
    return sizes.predict_size_from_weights(
        spec,
        weight_bytes,
        weights_error_bytes=MIXED_TYPES_ERROR * weight_bytes if spec.weight_dtype in LLAMA_CPP_BITS else 0.0,
        metadata_bytes=TOKEN_BYTES * spec.vocabulary_size + TENSOR_BYTES * len(spec.matrices),
        max_metadata_factor=2,
        copied_bytes=copied_bytes,
    )


def _block_minimum_bytes(spec: ModelSpec) -> int:
    """Return the extra bytes of Q4_1: each block stores an fp16 minimum where edgeopt stores a 4-bit zero-point."""
    stored = {name: scheme for name, scheme in spec.schemes.items() if not (spec.tied_embeddings and name == LM_HEAD)}
    shapes = {name: spec.matrices[name] for name, scheme in stored.items() if not scheme.symmetric}
    return sum(rows * -(-columns // stored[name].block_size) for name, (rows, columns) in shapes.items()) * 3 // 2
