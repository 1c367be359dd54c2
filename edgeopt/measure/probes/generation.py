"""Measure greedy generation: exact match with the baseline, repetition, and endless loops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgeopt.checkpoints import tokenizer as tokenizers
from edgeopt.core.config_objects import digest
from edgeopt.core.protocols import ProbeContext, Samples
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.stats.confidence_intervals import bootstrap_ratio

_DOCUMENT = "continuations.json"
_NGRAM = 4
_SAMPLE_TEXTS = 8
# metric -> start of its method
_METHODS = {
    "quality/exact_match": "share of outputs equal to the baseline's, token by token",
    "quality/degenerate_share": "share of outputs that end in a loop",
    "quality/repetition": f"share of {_NGRAM}-grams that occurred before",
}
_MAX_CYCLE, _MIN_CYCLES, _MIN_LOOP_TOKENS = 16, 3, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Quality of greedy continuations.

    The prompts are the starts of the first evaluation windows and have the length of the shortest prompt. Without a
    `baseline` reference the continuations are written to the scratch folder, which then serves as the baseline.

    Attributes:
        prompts: largest number of continuations; there is at most one per evaluation window.
        tokens: largest number of tokens per continuation; the context or an end-of-sequence token can end it earlier.

    Raises ConfigError for a value below its minimum.
    """

    METRICS: ClassVar[Mapping[str, str]] = dict.fromkeys(_METHODS, "")
    GROUP: ClassVar[str] = "quality"
    TIMING_SENSITIVE: ClassVar[bool] = False
    processes: int = 1
    prompts: int = 24
    tokens: int = 64

    def __post_init__(self) -> None:
        for name, minimum in {"processes": 1, "prompts": 1, "tokens": _MIN_LOOP_TOKENS}.items():
            if getattr(self, name) < minimum:
                raise ConfigError(
                    f"`{name}` must be at least {minimum}, got {getattr(self, name)}",
                    location=name,
                    hint=f"Use {minimum} or more",
                )

    def collect(self, context: ProbeContext) -> Samples:
        """Return the continuations as token ids, those of the baseline if it has any, and the first ones as text.

        Raises MeasureError if the baseline continued other prompts.
        """
        length = min(context.prompts)
        new_tokens = min(self.tokens, context.context_length - length)
        prompts = [window[:length] for window in context.documents[: self.prompts]]
        own = [list(context.session.generate(prompt, new_tokens)) for prompt in prompts]
        folder, request_digest = context.references.get("baseline"), digest([prompts, new_tokens])
        if folder is None:
            (context.scratch / _DOCUMENT).write_text(json.dumps({"asked": request_digest, "continuations": own}))
        baseline = _read_baseline(folder, request_digest) if folder else None
        texts = _decode_texts(context, prompts[:_SAMPLE_TEXTS], own, baseline)
        return {"tokens": new_tokens, "continuations": own, "baseline": baseline, "texts": texts}

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return the metrics with bootstrap intervals over the continuations."""
        own, baseline, max_tokens = (runs[0][name] for name in ("continuations", "baseline", "tokens"))
        shares: dict[str, list[float]] = {}
        if max_tokens >= _MIN_LOOP_TOKENS:  # a loop cannot be detected in fewer tokens
            shares["quality/degenerate_share"] = [ends_in_loop(tokens) for tokens in own]
        if baseline is not None:
            shares["quality/exact_match"] = [a == b for a, b in zip(own, baseline, strict=True)]
        measurements = [
            self._measurement(metric, share, [1] * len(own), max_tokens) for metric, share in shares.items()
        ]
        repetitions = [counts for counts in map(count_repeated_ngrams, own) if counts[1]]
        if repetitions:
            repeated, total = zip(*repetitions, strict=True)
            measurements.append(self._measurement("quality/repetition", repeated, total, max_tokens))
        return measurements

    def _measurement(
        self, metric: str, numerators: Sequence[float], denominators: Sequence[int], max_tokens: int
    ) -> Measurement:
        value, low, high = bootstrap_ratio(numerators, denominators)
        scope = f"{len(numerators)} greedy continuations of up to {max_tokens} tokens"
        return Measurement(
            metric=metric,
            unit=self.METRICS[metric],
            value=value,
            low=low,
            high=high,
            count=sum(denominators),
            method=f"{_METHODS[metric]}, {scope}, bootstrap over continuations",
        )


def _decode_texts(
    context: ProbeContext, prompts: Sequence[list[int]], own: Sequence[list[int]], baseline: Sequence[list[int]] | None
) -> list[dict[str, str]]:
    """Return prompts and continuations as text, for the table `generations`."""
    decode = tokenizers.load(context.engine.directory).decode
    return [
        {"prompt": decode(prompt), "continuation": decode(own[n]), "baseline": decode(baseline[n]) if baseline else ""}
        for n, prompt in enumerate(prompts)
    ]


def _read_baseline(folder: Path, request_digest: str) -> list[list[int]] | None:
    """Return the continuations of the baseline in `folder`; None if it has none.

    Raises MeasureError if they belong to other prompts or another length.
    """
    path = folder / _DOCUMENT
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    if document["asked"] != request_digest:
        raise MeasureError(
            "the baseline must continue the same prompts, got other prompts",
            location=str(folder),
            hint="Measure the baseline again with the same text, prompts and tokens",
        )
    continuations: list[list[int]] = document["continuations"]
    return continuations


def count_repeated_ngrams(tokens: Sequence[int]) -> list[int]:
    """Return [4-grams that occurred before, all 4-grams] of a sequence."""
    ngrams = list(zip(*(tokens[i:] for i in range(_NGRAM)), strict=False))
    return [len(ngrams) - len(set(ngrams)), len(ngrams)]


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Return whether a sequence ends in a loop: a cycle of at most 16 tokens, repeated until the end.

    The repeated part has at least three cycles, the last of which may be incomplete, and at least 16 tokens. A line of
    dashes inside a text is therefore not a loop.
    """
    return any(
        _periodic_suffix_length(tokens, cycle) >= max(_MIN_CYCLES * cycle, _MIN_LOOP_TOKENS)
        for cycle in range(1, _MAX_CYCLE + 1)
    )


def _periodic_suffix_length(tokens: Sequence[int], cycle: int) -> int:
    """Return the length of the longest suffix in which each token equals the one `cycle` positions before it."""
    length = min(cycle, len(tokens))
    while length < len(tokens) and tokens[-length - 1] == tokens[-length - 1 + cycle]:
        length += 1
    return length
