"""Greedy decoding by the scores of a runtime that leaves the choice of a token to its caller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Read = Callable[[Sequence[int]], "np.ndarray"]
"""Reads on, and gives the scores after the last of these tokens: float32, shape (vocabulary,), to be written to."""


def decode(
    read: Read, tokens: Sequence[int], max_new_tokens: int, *, ends: Collection[int], stop_at_end: bool
) -> Iterator[int]:
    """The tokens of the highest score after `tokens`, as Session.generate promises them."""
    for _ in range(max_new_tokens):
        scores = read(tokens)
        if not stop_at_end:
            scores[list(ends)] = -float("inf")
        token = int(scores.argmax())
        if stop_at_end and token in ends:
            return
        yield token
        tokens = [token]
