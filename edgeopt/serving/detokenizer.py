"""From token ids to text piece by piece, with what must be held back until it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Decoding:
    """The text of tokens that come one by one.

    A character whose bytes are not all there yet is held back, and so is what may be the beginning of a stop text.

    Attributes:
        stopped: whether a stop text was found; it and what came after it are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream, self._held = DecodeStream(skip_special_tokens=True), ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after `token`."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [location for stop in self._stops if (location := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        certain = len(self._held) - _overlap(self._held, self._stops)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def end(self) -> str:
        """What was held back and turns out to be text."""
        return self._held


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin a stop text."""
    longest = max(map(len, stops), default=0)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
