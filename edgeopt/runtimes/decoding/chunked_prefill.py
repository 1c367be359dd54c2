"""How prompts are read: in parts, since tokens that are read at once cost memory for activations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec

CHUNK_TOKENS = 32
"""As many as hide that weights are read, where they are in memory: more are hardly faster."""
BY_LENGTH = ("longrope", "dynamic")
"""Rotary tables that depend on the length of the prompt."""


def chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The tokens in order, `size` at once."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


def check(tokens: int) -> None:
    """ConfigError where a prompt cannot be read so many tokens at once."""
    if tokens < 1:
        raise ConfigError(
            f"{tokens} is no number of tokens", location="prompt_tokens", hint=f"Give {CHUNK_TOKENS}, or up to 512"
        )


def at_once(directory: Path, spec: ModelSpec, prompt_tokens: int) -> int:
    """`prompt_tokens`, or room for every prompt where the model has to see one as a whole."""
    return spec.context_length if _reads_whole(directory) else prompt_tokens


def _reads_whole(directory: Path) -> bool:
    """Whether the model with its `config.json` in `directory` computes something else where a prompt comes in parts."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type", rope.get("type")) in BY_LENGTH
