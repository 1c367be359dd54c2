"""Convert a stream of token ids to text, and hold back text that later tokens may change or remove."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Detokenizer:
    """Incremental detokenizer with stop texts.

    It holds back a character until all its bytes are complete, and text that may be the beginning of a stop text.

    Attributes:
        stopped: a stop text was found. The output ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._stream, self._pending = DecodeStream(skip_special_tokens=True), ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final."""
        self._pending += self._stream.step(self._tokenizer, token) or ""
        positions = [position for stop in self._stop if (position := self._pending.find(stop)) >= 0]
        if positions:
            self.stopped = True
            return self._pending[: min(positions)]
        final_length = len(self._pending) - _partial_stop_length(self._pending, self._stop)
        text, self._pending = self._pending[:final_length], self._pending[final_length:]
        return text

    def flush(self) -> str:
        """Return the text that was held back, after the last token."""
        return self._pending


def _partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that begins a stop text."""
    max_length = max(map(len, stop), default=0) - 1
    for length in range(min(max_length, len(text)), 0, -1):
        if any(candidate.startswith(text[-length:]) for candidate in stop):
            return length
    return 0
