"""An engine as benchmarks ask language models: how likely a text is, and what it says until it stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.checkpoints import tokenizer
from edgeopt.errors import MeasureError
from edgeopt.measure.stats.divergence import log_softmax

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.protocols import Session


class Scorer:
    """A session with its tokenizer; every text begins with the model's prefix, as the evaluation windows do.

    What exceeds `context_length` tokens is cut at its beginning.
    """

    def __init__(self, session: Session, directory: Path, context_length: int) -> None:
        self._session, self._context_length = session, context_length
        self._tokenizer, self._begin = tokenizer.load(directory), tokenizer.prefix(directory)
        self._last: tuple[list[int], int, np.ndarray] | None = None

    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log p(continuation | context) in nats, whether greedy decoding would have said it).

        Both are tokenized as one text, and spaces at the end of the context belong to the continuation.
        """
        kept = context.rstrip()
        start = len(self._ids(kept))
        return self._score(self._ids(kept + context[len(kept) :] + continuation), start)

    def rolling_log_likelihood(self, text: str) -> float:
        """log p(text) in nats; each token is predicted once, from as many before it as fit."""
        ids, start, total = self._ids(text), len(self._begin), 0.0
        while start < len(ids):
            end = min(start + self._context_length, len(ids))
            total += self._score(ids[:end], start)[0]
            start = end
        return total

    def continuation(self, context: str, until: Sequence[str], max_new_tokens: int) -> str:
        """What the engine says greedily after `context`, up to the first of the texts `until`."""
        room = self._context_length - max_new_tokens
        if room < 1:
            raise MeasureError(
                f"{max_new_tokens} tokens are to be generated in a context of {self._context_length}",
                hint="Raise target.context_length, or lower max_gen_toks in the task's generation_kwargs",
            )
        said: list[int] = []
        for token in self._session.generate(self._require(self._ids(context)[-room:]), max_new_tokens):
            said.append(token)
            text = self._tokenizer.decode(said)
            stops = [text.index(stop) for stop in until if stop in text]
            if stops:
                return text[: min(stops)]
        return self._tokenizer.decode(said)

    def _ids(self, text: str) -> list[int]:
        return [*self._begin, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def _score(self, ids: list[int], start: int) -> tuple[float, bool]:
        """log p(ids[start:] | ids[:start]), and whether each of them is the most probable."""
        asked = ids[start:]
        if not asked:
            return 0.0, True
        if len(asked) > self._context_length:
            raise MeasureError(
                f"{len(asked)} tokens are to be scored in a context of {self._context_length}",
                hint="Raise target.context_length",
            )
        self._require(ids[:start])
        predicted = self._predicted(ids[-self._context_length - 1 : -1], len(asked))
        chosen = predicted[range(len(asked)), asked]
        return float(chosen.sum(dtype=float)), bool((predicted.argmax(axis=-1) == asked).all())

    def _predicted(self, inputs: list[int], count: int) -> np.ndarray:
        """log p of the tokens after each of the last `count` inputs.

        The last answer is kept: choices of one token each share it.
        """
        if self._last is None or self._last[:2] != (inputs, count):
            self._last = inputs, count, log_softmax(self._session.logits(inputs)[-count:])
        return self._last[2]

    def _require(self, ids: list[int]) -> list[int]:
        if not ids:
            raise MeasureError(
                "nothing comes before the text, and the model has no beginning-of-sequence token",
                hint="Give the task a doc_to_text that is not empty",
            )
        return ids
