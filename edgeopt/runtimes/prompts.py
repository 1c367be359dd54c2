"""How prompts are read: in parts, since more tokens at once cost memory for activations and are hardly faster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeopt.spec import ModelSpec

CHUNK_TOKENS = 32
BY_LENGTH = ("longrope", "dynamic")
"""Rotary tables that depend on the length of the prompt."""


def chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The tokens in order, `size` at once."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


def at_once(directory: Path, spec: ModelSpec) -> int:
    """Of a prompt, how many tokens are read at once by a runtime that takes no more by itself."""
    return spec.context_length if reads_whole_prompts(directory) else CHUNK_TOKENS


def reads_whole_prompts(directory: Path) -> bool:
    """Whether the model with its `config.json` in `directory` computes something else where a prompt comes in parts."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type", rope.get("type")) in BY_LENGTH
