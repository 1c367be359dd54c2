"""Sessions of runtimes that read tokens on and say the logits where they are wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from edgeopt.runtimes.decoding import greedy, prompt_lookup
from edgeopt.runtimes.decoding.chunked_prefill import chunks

if TYPE_CHECKING:
    import numpy as np


class Past(Protocol):
    """What was read of one sequence."""

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Read on: logits at `rows` of these tokens, float32, shape (rows, vocabulary), to be written to."""
        ...

    def back(self, count: int) -> None:
        """Forget the last `count` tokens."""
        ...


class PastSession(ABC):
    """What a Session does by a `Past` for each sequence."""

    _ends: Collection[int]
    _at_once: int
    """Of a prompt, how many tokens are read together."""
    _guessed: int = 0
    """How many tokens are guessed at once, by looking them up in the text."""

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        past = self._sequence(len(tokens) + max_new_tokens, adapter)

        def read(given: Sequence[int]) -> np.ndarray:
            last: np.ndarray = [past.read(part, [len(part) - 1])[0] for part in chunks(given, self._at_once)][-1]
            return last

        if self._guessed:
            return prompt_lookup.decode(
                past,
                read(tokens),
                tokens,
                max_new_tokens,
                guessed=self._guessed,
                ends=self._ends,
                stop_at_end=stop_at_end,
            )
        return greedy.decode(read, tokens, max_new_tokens, ends=self._ends, stop_at_end=stop_at_end)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        import numpy as np

        past = self._sequence(len(tokens), adapter)
        return np.concatenate([past.read(part, range(len(part))) for part in chunks(tokens, self._at_once)])

    @abstractmethod
    def _sequence(self, length: int, adapter: str | None) -> Past:
        """An empty one with room for so many tokens; ConfigError for an unknown adapter."""
