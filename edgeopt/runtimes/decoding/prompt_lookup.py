"""Prompt look-up: what followed the last tokens when they stood in the text before is guessed to follow again.

Several guesses are read at once, which takes little longer than one token where weights are what is waited for, and as
many count as the model would have said itself: what is generated is the same. Sources: Saxena, "Prompt lookup
decoding" (2023); Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.runtimes.decoding.incremental_session import Past

MOST = 16
"""Tokens that are guessed at once, at most: a prompt's own reading is faster than so many guesses that are wrong."""
ALIKE = (3, 2)
"""How many last tokens have to have stood in the text before, the surest first."""


def check(tokens: int, *, at_once: int = MOST + 1) -> None:
    """ConfigError where so many tokens cannot be guessed by a runtime that reads `at_once` together at most."""
    most = min(MOST, at_once - 1)
    if not 0 <= tokens <= most:
        raise ConfigError(f"{tokens} is not in 0 … {most}", location="prompt_lookup", hint="Give 2, or 0 for none")


def decode(
    past: Past,
    scores: np.ndarray,
    tokens: Sequence[int],
    max_new_tokens: int,
    *,
    guessed: int,
    ends: Collection[int],
    stop_at_end: bool,
) -> Iterator[int]:
    """As greedy.decode promises, with up to `guessed` tokens read beside each.

    Args:
        past: has read `tokens`.
        scores: after the last of them, shape (vocabulary,).
    """
    text, draft, rows = Text(tokens), list[int](), [scores]
    while max_new_tokens:
        for index, row in enumerate(rows):
            if not stop_at_end:
                row[list(ends)] = -float("inf")
            token = int(row.argmax())
            if stop_at_end and token in ends:
                return
            yield token
            text.append(token)
            max_new_tokens -= 1
            if index < len(draft) and draft[index] != token:
                break
        if not max_new_tokens:
            return
        past.back(len(draft) - index)
        draft = text.guess(min(guessed, max_new_tokens - 1))
        read = [token, *draft]
        rows = list(past.read(read, range(len(read))))


class Text:
    """Tokens, and what followed each few of them when they stood there last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        for count in ALIKE:
            if len(self._tokens) >= count:
                self._following[tuple(self._tokens[-count:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """What followed the last tokens when they stood in the text before; nothing where they did not."""
        for count in ALIKE:
            index = self._following.get(tuple(self._tokens[-count:]))
            if index is not None:
                return self._tokens[index : index + most]
        return []
