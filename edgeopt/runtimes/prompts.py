"""How prompts are read: in parts, since more tokens at once cost memory for activations and are hardly faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CHUNK_TOKENS = 32


def chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The tokens in order, `size` at once."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))
