"""Draft tokens by prompt lookup: continue the last n-gram as it continued earlier in the text.

The model scores all draft tokens in one call, which takes little longer than one token while reading the weights
dominates. Only drafts that equal the model's own choice are accepted, so the output does not change. Sources: Saxena,
"Prompt lookup decoding" (2023); Leviathan et al., "Fast inference from transformers via speculative decoding"
(arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.runtimes.decoding.incremental_session import SequenceState

MAX_DRAFT_TOKENS = 16
"""Beyond this, verifying rejected drafts costs more time than accepted ones save."""
NGRAM_SIZES = (3, 2)
"""Lengths of the n-grams that are looked up. The longest match wins, because it predicts best."""


def check(draft_tokens: int, *, chunk_tokens: int = MAX_DRAFT_TOKENS + 1) -> None:
    """Raise ConfigError if `draft_tokens` and one more token do not fit a call of `chunk_tokens` tokens."""
    largest = min(MAX_DRAFT_TOKENS, chunk_tokens - 1)
    if not 0 <= draft_tokens <= largest:
        raise ConfigError(
            f"`prompt_lookup` must be between 0 and {largest}, got {draft_tokens}",
            location="prompt_lookup",
            hint="Use 2, or 0 to disable it",
        )


def decode(
    state: SequenceState,
    logits: np.ndarray,
    tokens: Sequence[int],
    max_new_tokens: int,
    *,
    draft_tokens: int,
    eos_token_ids: Collection[int],
    stop_at_end: bool,
) -> Iterator[int]:
    """Yield the same tokens as `greedy.decode`, verifying up to `draft_tokens` drafts in each call.

    Args:
        state: has read `tokens`.
        logits: of the last of `tokens`, shape (vocabulary,).
    """
    index, draft, rows = NgramIndex(tokens), list[int](), [logits]
    while max_new_tokens:
        for accepted, row in enumerate(rows):
            if not stop_at_end:
                row[list(eos_token_ids)] = -float("inf")
            token = int(row.argmax())
            if stop_at_end and token in eos_token_ids:
                return
            yield token
            index.append(token)
            max_new_tokens -= 1
            if accepted < len(draft) and draft[accepted] != token:
                break
        if not max_new_tokens:
            return
        state.rollback(len(draft) - accepted)
        draft = index.draft(min(draft_tokens, max_new_tokens - 1))
        new_tokens = [token, *draft]
        rows = list(state.forward(new_tokens, range(len(new_tokens))))


class NgramIndex:
    """A text and the position after the last earlier occurrence of each of its n-grams."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next_position: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        for size in NGRAM_SIZES:
            if len(self._tokens) >= size:
                self._next_position[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` tokens that followed the last n-gram before; empty if it is new."""
        for size in NGRAM_SIZES:
            position = self._next_position.get(tuple(self._tokens[-size:]))
            if position is not None:
                return self._tokens[position : position + max_tokens]
        return []
