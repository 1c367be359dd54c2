"""Define the file and tensor names of the ONNX graphs that edgeopt exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GRAPH_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
INPUT_IDS, PAST_LENGTH, POSITION, ROWS, LOGITS = "input_ids", "past_length", "position", "rows", "logits"
"""Inputs and the first output of a graph:

    input_ids     token ids, shape (batch, tokens)
    past_length   number of tokens in the key-value cache, scalar
    position      position of the first of these tokens in the text, scalar
    rows          indices into the tokens whose logits are computed, shape (rows,)
    logits        shape (batch, rows, vocabulary)
"""
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
"""Prefixes of cached keys and values, input and output, shape (batch, kv_heads, capacity, head_size)."""
SCALES_SUFFIX, RECENT_SUFFIX = ".scales", ".recent"
CACHE_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("",),
    "fp16": ("",),
    "int8": ("", SCALES_SUFFIX, RECENT_SUFFIX),
    "int4": ("", SCALES_SUFFIX, RECENT_SUFFIX),
}
"""Suffixes of the buffers that hold the keys or values of a layer, by cache type.

Quantized caches store codes, the scales of their blocks and the most recent tokens in floating point, shape (batch,
kv_heads, recent, head_size).
"""

KNOWN_INPUTS = frozenset(
    {INPUT_IDS, PAST_LENGTH, POSITION, ROWS, "attention_mask", "position_ids", "cache_position", "use_cache_branch"}
)
"""Inputs besides keys and values that a session can feed: those of edgeopt's graphs and of other exporters."""


def cache_names(layers: int, prefix: str, cache_type: str = "fp32") -> list[str]:
    """Return the names of all cache buffers, in the order of the layers."""
    return [
        f"{prefix}{layer}.{part}{suffix}"
        for layer in range(layers)
        for part in ("key", "value")
        for suffix in CACHE_SUFFIXES[cache_type]
    ]


def find_nonstandard_operators(path: Path) -> list[str]:
    """Return one sentence for each operator of the graph at `path` that is not in the ONNX standard."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    nonstandard = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    return [f"{operator} is not an operator of the ONNX standard" for operator in nonstandard]
