"""Sessions of runtimes that read tokens on and say the logits where they are wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from edgeopt.runtimes import greedy
from edgeopt.runtimes.prompts import chunks


class Past(Protocol):
    """What was read of one sequence."""

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Read on: logits at `rows` of these tokens, float32, shape (rows, vocabulary)."""
        ...


def generate(
    past: Past, tokens: Sequence[int], max_new_tokens: int, *, at_once: int, ends: Collection[int], stop_at_end: bool
) -> Iterator[int]:
    """Greedy decoding as Session.generate promises it; of the prompt, `at_once` tokens are read together."""

    def read(given: Sequence[int]) -> np.ndarray:
        last: np.ndarray = [past.read(part, [len(part) - 1])[0] for part in chunks(given, at_once)][-1]
        return last

    return greedy.decode(read, tokens, max_new_tokens, ends=ends, stop_at_end=stop_at_end)


def logits(past: Past, tokens: Sequence[int], *, at_once: int) -> np.ndarray:
    """Next-token logits at every position: float32, shape (tokens, vocabulary)."""
    return np.concatenate([past.read(part, range(len(part))) for part in chunks(tokens, at_once)])
