"""Implement generation and scoring for runtimes that extend a sequence token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from edgeopt.runtimes.decoding import chunked_prefill, greedy, prompt_lookup

if TYPE_CHECKING:
    import numpy as np


class SequenceState(Protocol):
    """The tokens that an engine has read of one sequence, usually as a key-value cache."""

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Append `tokens` and return logits: float32, shape (len(rows), vocabulary), writable.

        Args:
            rows: indices into `tokens` of the positions whose logits are returned.
        """
        ...

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens."""
        ...


class IncrementalSession(ABC):
    """Base of sessions that compute through one `SequenceState` per sequence."""

    _eos_token_ids: Collection[int]
    _chunk_tokens: int
    """Largest count of prompt tokens computed at once."""
    _draft_tokens: int = 0
    """Draft tokens of prompt lookup; 0 disables it."""

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        state = self._new_sequence(len(tokens) + max_new_tokens, adapter)

        def forward(new_tokens: Sequence[int]) -> np.ndarray:
            chunks = chunked_prefill.split(new_tokens, self._chunk_tokens)
            logits: np.ndarray = [state.forward(chunk, [len(chunk) - 1])[0] for chunk in chunks][-1]
            return logits

        if self._draft_tokens:
            return prompt_lookup.decode(
                state,
                forward(tokens),
                tokens,
                max_new_tokens,
                draft_tokens=self._draft_tokens,
                eos_token_ids=self._eos_token_ids,
                stop_at_end=stop_at_end,
            )
        return greedy.decode(
            forward, tokens, max_new_tokens, eos_token_ids=self._eos_token_ids, stop_at_end=stop_at_end
        )

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        import numpy as np

        state = self._new_sequence(len(tokens), adapter)
        chunks = chunked_prefill.split(tokens, self._chunk_tokens)
        return np.concatenate([state.forward(chunk, range(len(chunk))) for chunk in chunks])

    @abstractmethod
    def _new_sequence(self, length: int, adapter: str | None) -> SequenceState:
        """Return the state of an empty sequence of at most `length` tokens.

        Raises ConfigError for an unknown adapter.
        """
