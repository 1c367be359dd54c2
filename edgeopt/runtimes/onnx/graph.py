"""What the graphs of portable engines are called and made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GRAPH_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
INPUT_IDS, PAST_LENGTH, POSITION, ROWS, LOGITS = "input_ids", "past_length", "position", "rows", "logits"
"""Token ids (batch, tokens); how many tokens the cache holds (); the place of the first of these tokens in the text ();
at which of them logits are wanted (rows); and the logits (batch, rows, vocabulary)."""
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
"""Prefixes of the keys and values of each layer, before and after, (batch, heads, capacity, head size)."""
SCALES_SUFFIX, RECENT_SUFFIX = ".scales", ".recent"
CACHE_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("",),
    "fp16": ("",),
    "int8": ("", SCALES_SUFFIX, RECENT_SUFFIX),
    "int4": ("", SCALES_SUFFIX, RECENT_SUFFIX),
}
"""By the type of keys and values, how the names of what is kept of either end: codes have scales of their blocks, and
beside them the last tokens as they are, (batch, heads, recent, head size)."""

KNOWN_INPUTS = frozenset(
    {INPUT_IDS, PAST_LENGTH, POSITION, ROWS, "attention_mask", "position_ids", "cache_position", "use_cache_branch"}
)
"""Inputs beside keys and values that a session can give: those of edgeopt's graphs and of other exporters."""


def cache_names(layers: int, prefix: str, form: str = "fp32") -> list[str]:
    """Names of keys and values of every layer, kept in the type `form`."""
    return [
        f"{prefix}{number}.{part}{end}"
        for number in range(layers)
        for part in ("key", "value")
        for end in CACHE_SUFFIXES[form]
    ]


def nonstandard_operators(path: Path) -> list[str]:
    """Operators of the graph at `path` that are no part of the ONNX standard, one sentence each."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    return [f"{name} is no operator of the ONNX standard" for name in foreign]
