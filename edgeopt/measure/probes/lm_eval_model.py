"""Implement the requests of lm-evaluation-harness with an engine: log-likelihoods and greedy generation."""

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
    """Session with its tokenizer.

    Every text starts with the model's prefix, like evaluation windows. Texts of more than `context_length` tokens are
    truncated at the start.
    """

    def __init__(self, session: Session, directory: Path, context_length: int) -> None:
        self._session, self._context_length = session, context_length
        self._tokenizer, self._prefix = tokenizer.load(directory), tokenizer.prefix_ids(directory)
        self._cached: tuple[list[int], int, np.ndarray] | None = None

    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return log p(continuation | context) in nats, and True if greedy decoding produces the continuation.

        Context and continuation are tokenized as one text. Spaces at the end of the context count as part of the
        continuation.
        """
        stripped = context.rstrip()
        start = len(self._encode(stripped))
        return self._score(self._encode(context + continuation), start)

    def rolling_log_likelihood(self, text: str) -> float:
        """Return log p(text) in nats. Each token is predicted once; the context holds as many earlier tokens as fit."""
        ids, start, total = self._encode(text), len(self._prefix), 0.0
        while start < len(ids):
            end = min(start + self._context_length, len(ids))
            total += self._score(ids[:end], start)[0]
            start = end
        return total

    def generate_until(self, context: str, stops: Sequence[str], max_new_tokens: int) -> str:
        """Return the greedy continuation of `context`, up to the first occurrence of a text in `stops`.

        Raises MeasureError if the context length leaves no token for the prompt.
        """
        prompt_length = self._context_length - max_new_tokens
        if prompt_length < 1:
            raise MeasureError(
                f"the context must have room for {max_new_tokens} generated tokens and at least one prompt token, "
                f"got a context of {self._context_length} tokens",
                hint="Increase target.context_length, or reduce max_gen_toks in the task's generation_kwargs",
            )
        generated: list[int] = []
        prompt = self._require_context(self._encode(context)[-prompt_length:])
        for token in self._session.generate(prompt, max_new_tokens):
            generated.append(token)
            text = self._tokenizer.decode(generated)
            positions = [text.index(stop) for stop in stops if stop in text]
            if positions:
                return text[: min(positions)]
        return self._tokenizer.decode(generated)

    def _encode(self, text: str) -> list[int]:
        return [*self._prefix, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def _score(self, ids: list[int], start: int) -> tuple[float, bool]:
        """Return log p(ids[start:] | ids[:start]) in nats, and True if each of ids[start:] is the most probable."""
        targets = ids[start:]
        if not targets:
            return 0.0, True
        if len(targets) > self._context_length:
            raise MeasureError(
                f"a scored text must have at most {self._context_length} tokens, got {len(targets)}",
                hint="Increase target.context_length",
            )
        self._require_context(ids[:start])
        predicted = self._log_probabilities(ids[-self._context_length - 1 : -1], len(targets))
        scores = predicted[range(len(targets)), targets]
        return float(scores.sum(dtype=float)), bool((predicted.argmax(axis=-1) == targets).all())

    def _log_probabilities(self, inputs: list[int], count: int) -> np.ndarray:
        """Return the log-probabilities after each of the last `count` inputs, shape (count, vocabulary).

        The last result is cached, because single-token choices of one question share it.
        """
        if self._cached is None or self._cached[:2] != (inputs, count):
            self._cached = inputs, count, log_softmax(self._session.logits(inputs)[-count:])
        return self._cached[2]

    def _require_context(self, ids: list[int]) -> list[int]:
        """Return `ids`. Raises MeasureError if they are empty."""
        if not ids:
            raise MeasureError(
                "the context must not be empty, because the model has no beginning-of-sequence token",
                hint="Use a doc_to_text that is not empty",
            )
        return ids
