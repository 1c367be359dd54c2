"""What an engine writes when it goes on by itself: whether it loops, and whether it is what the baseline writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgeopt.checkpoints import tokenizer as tokenizers
from edgeopt.core.config_objects import digest
from edgeopt.core.protocols import Samples, Subject
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.stats.confidence_intervals import bootstrap_ratio

_DOCUMENT = "continuations.json"
_NGRAM = 4
_SHOWN = 8
# metric -> what its figure says
_FIGURES = {
    "quality/exact_match": "share equal to the baseline's token for token",
    "quality/degenerate_share": "share that ends in a loop",
    "quality/repetition": f"share of {_NGRAM}-grams that occurred before",
}
_LONGEST_CYCLE, _LEAST_ROUNDS, _LEAST_TOKENS = 16, 3, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Greedy continuations of the first evaluation windows' beginnings, as long as the shortest prompt.

    Measured without a `baseline` reference, the engine becomes one: its continuations stay in the scratch folder.

    Attributes:
        prompts: continuations at most; there are no more than evaluation windows.
        tokens: of each continuation, fewer where the context ends or the engine says that it is done.
    """

    METRICS: ClassVar[Mapping[str, str]] = dict.fromkeys(_FIGURES, "")
    GROUP: ClassVar[str] = "quality"
    TIMED: ClassVar[bool] = False
    processes: int = 1
    prompts: int = 24
    tokens: int = 64

    def __post_init__(self) -> None:
        for name, least in {"processes": 1, "prompts": 1, "tokens": _LEAST_TOKENS}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{getattr(self, name)} is too few", location=name, hint=f"Give {least} or more")

    def collect(self, subject: Subject) -> Samples:
        """The continuations as token ids and, against a baseline that has some, the baseline's; the first as texts."""
        length = min(subject.prompts)
        new_tokens = min(self.tokens, subject.context_length - length)
        prompts = [window[:length] for window in subject.documents[: self.prompts]]
        own = [list(subject.session.generate(prompt, new_tokens)) for prompt in prompts]
        folder, asked = subject.references.get("baseline"), digest([prompts, new_tokens])
        if folder is None:
            (subject.scratch / _DOCUMENT).write_text(json.dumps({"asked": asked, "continuations": own}))
        baseline = _kept(folder, asked) if folder else None
        texts = _texts(subject, prompts[:_SHOWN], own, baseline)
        return {"tokens": new_tokens, "continuations": own, "baseline": baseline, "texts": texts}

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        own, baseline, longest = (runs[0][name] for name in ("continuations", "baseline", "tokens"))
        shares: dict[str, list[float]] = {}
        if longest >= _LEAST_TOKENS:  # shorter ones could not be seen to loop
            shares["quality/degenerate_share"] = [loops(tokens) for tokens in own]
        if baseline is not None:
            shares["quality/exact_match"] = [a == b for a, b in zip(own, baseline, strict=True)]
        figures = [self._figure(metric, share, [1] * len(own), longest) for metric, share in shares.items()]
        repeated = [pair for pair in map(repetition, own) if pair[1]]
        if repeated:
            seen, grams = zip(*repeated, strict=True)
            figures.append(self._figure("quality/repetition", seen, grams, longest))
        return figures

    def _figure(self, metric: str, over: Sequence[float], under: Sequence[int], longest: int) -> Measurement:
        value, low, high = bootstrap_ratio(over, under)
        where = f"in {len(over)} greedy continuations of up to {longest} tokens"
        return Measurement(
            metric=metric,
            unit=self.METRICS[metric],
            value=value,
            low=low,
            high=high,
            count=sum(under),
            method=f"{_FIGURES[metric]}, {where}, bootstrap over them",
        )


def _texts(
    subject: Subject, prompts: Sequence[list[int]], own: Sequence[list[int]], baseline: Sequence[list[int]] | None
) -> list[dict[str, str]]:
    """Prompts and what followed, for people."""
    decode = tokenizers.load(subject.engine.directory).decode
    return [
        {"prompt": decode(prompt), "continuation": decode(own[n]), "baseline": decode(baseline[n]) if baseline else ""}
        for n, prompt in enumerate(prompts)
    ]


def _kept(folder: Path, asked: str) -> list[list[int]] | None:
    """The continuations in a baseline's folder; None where it made none, MeasureError where it made others."""
    path = folder / _DOCUMENT
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    if document["asked"] != asked:
        raise MeasureError(
            "the baseline continued other prompts",
            location=str(folder),
            hint="Measure the baseline again with this text, prompts and tokens",
        )
    continuations: list[list[int]] = document["continuations"]
    return continuations


def repetition(tokens: Sequence[int]) -> list[int]:
    """[4-grams that occurred before, all 4-grams] of a sequence."""
    grams = list(zip(*(tokens[i:] for i in range(_NGRAM)), strict=False))
    return [len(grams) - len(set(grams)), len(grams)]


def loops(tokens: Sequence[int]) -> bool:
    """Whether a sequence ends in a loop: a cycle of at most 16 tokens, repeated to the end.

    The repeated stretch holds the cycle three times or more (its last round may be cut short by the
    end) and 16 tokens or more, so that a ruler of dashes within a text is none.
    """
    return any(
        _periodic_end(tokens, cycle) >= max(_LEAST_ROUNDS * cycle, _LEAST_TOKENS)
        for cycle in range(1, _LONGEST_CYCLE + 1)
    )


def _periodic_end(tokens: Sequence[int], cycle: int) -> int:
    """Length of the longest end of `tokens` in which each token equals the one `cycle` places before it."""
    length = min(cycle, len(tokens))
    while length < len(tokens) and tokens[-length - 1] == tokens[-length - 1 + cycle]:
        length += 1
    return length
