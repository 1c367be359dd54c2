"""Decode greedily on runtimes that return logits and leave the choice of the token to the caller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Forward = Callable[[Sequence[int]], "np.ndarray"]
"""Append tokens to the sequence and return the logits of the last one: float32, shape (vocabulary,), writable."""


def decode(
    forward: Forward, tokens: Sequence[int], max_new_tokens: int, *, eos_token_ids: Collection[int], stop_at_end: bool
) -> Iterator[int]:
    """Yield the most likely token after `tokens`, again and again, as `Session.generate` specifies."""
    for _ in range(max_new_tokens):
        logits = forward(tokens)
        if not stop_at_end:
            logits[list(eos_token_ids)] = -float("inf")
        token = int(logits.argmax())
        if stop_at_end and token in eos_token_ids:
            return
        yield token
        tokens = [token]
