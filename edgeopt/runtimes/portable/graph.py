"""What the graphs of portable engines are called and made of."""

from __future__ import annotations

from pathlib import Path

NAME, WEIGHTS = "model.onnx", "model.onnx.data"
TOKENS, PAST_LENGTH, ROWS, LOGITS = "input_ids", "past_length", "rows", "logits"
"""Token ids (batch, tokens); how many tokens the cache holds (); at which of the given tokens logits are wanted (rows);
and the logits (batch, rows, vocabulary)."""
PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the keys and values of each layer, before and after, (batch, heads, capacity, head size)."""

KNOWN = frozenset({TOKENS, PAST_LENGTH, ROWS, "attention_mask", "position_ids", "cache_position", "use_cache_branch"})
"""Inputs beside keys and values that a session can give: those of edgeopt's graphs and of other exporters."""


def caches(layers: int, prefix: str) -> list[str]:
    """Names of keys and values of every layer."""
    return [f"{prefix}{number}.{part}" for number in range(layers) for part in ("key", "value")]


def findings(path: Path) -> list[str]:
    """Operators of the graph at `path` that are no part of the ONNX standard, one sentence each."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    return [f"{name} is no operator of the ONNX standard" for name in foreign]
