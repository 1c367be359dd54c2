"""Read prompts in chunks, because the memory for activations grows with the tokens computed at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec

CHUNK_TOKENS = 32
"""Default chunk. It is large enough to hide the reading of weights from memory: larger chunks are hardly faster."""
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")
"""Rotary embedding types whose frequencies depend on the length of the prompt."""


def split(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the tokens in order, in chunks of `size`."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


def check(prompt_tokens: int) -> None:
    """Raise ConfigError if `prompt_tokens`, the tokens of a chunk, is not positive."""
    if prompt_tokens < 1:
        raise ConfigError(
            f"`prompt_tokens` must be at least 1, got {prompt_tokens}",
            location="prompt_tokens",
            hint=f"Use {CHUNK_TOKENS}, or up to 512",
        )


def resolve_chunk_tokens(directory: Path, spec: ModelSpec, prompt_tokens: int) -> int:
    """Return the tokens of a chunk: `prompt_tokens`, or the context length if the prompt must be read at once."""
    return spec.context_length if _requires_whole_prompt(directory) else prompt_tokens


def _requires_whole_prompt(directory: Path) -> bool:
    """Return whether chunks would change the rotary embeddings of the model whose `config.json` is in `directory`."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT_ROPE
