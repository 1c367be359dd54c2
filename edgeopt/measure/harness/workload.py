"""What an engine is given to do while it is measured: prompts of fixed lengths and windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.corpus import Text

PROMPT_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The prompt lengths that have a metric of their own; a workload names some of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Token ids: `prompts` by their length and `documents`, each from an empty past.

    `left_out` holds the prompt lengths that do not fit the context with one token to generate.
    """

    context_length: int
    prompts: dict[int, list[int]]
    documents: list[list[int]]
    left_out: tuple[int, ...]


def build_workload(
    evaluation: Text,
    directory: Path,
    *,
    context_length: int,
    prompt_lengths: Sequence[int],
    window_tokens: int,
    max_windows: int,
) -> Workload:
    """The workload for the tokenizer in `directory`; the same text and tokenizer give the same workload.

    Raises InputError where the text holds not one window of 16 tokens, ConfigError where no prompt fits.
    """
    fitting = [length for length in sorted(prompt_lengths) if length < context_length]
    if not fitting:
        raise ConfigError(
            f"a context of {context_length} tokens holds none of the prompts {list(prompt_lengths)}",
            location="measure.prompt_lengths",
            hint="Name a shorter one",
        )
    asked = _Asked(
        text=evaluation,
        tokenizer=_digest(directory),
        length=min(window_tokens, context_length),
        directory=directory,
    )
    everything, begin = _tokenized(asked)
    stream = [token for window in everything for token in window[len(begin) :]]
    return Workload(
        context_length=context_length,
        prompts={length: repeat_to_length(begin + stream, length) for length in fitting},
        documents=_spread(everything, max_windows),
        left_out=tuple(sorted(set(prompt_lengths) - set(fitting))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A text in windows of at most `length` tokens, by a tokenizer that is the same wherever its files lie."""

    text: Text
    tokenizer: str
    length: int
    directory: Path = field(compare=False)


@lru_cache(maxsize=1)
def _tokenized(asked: _Asked) -> tuple[list[list[int]], list[int]]:
    """The windows and what each begins with; kept, since one evaluation asks for each group of probes."""
    from edgeopt.checkpoints import tokenizer as tokens

    return tokens.windows(asked.text, asked.directory, length=asked.length), tokens.prefix(asked.directory)


def _digest(directory: Path) -> str:
    from hashlib import sha256  # its library takes 5 MiB, which the measured process does without

    from edgeopt.checkpoints import tokenizer as tokens

    combined = sha256()
    for name in tokens.FILES:
        path = directory / name
        combined.update(path.read_bytes() if path.is_file() else b"\0")
    return combined.hexdigest()


def repeat_to_length(ids: Sequence[int], length: int) -> list[int]:
    """The first `length` ids of an endless repetition of `ids`."""
    return [ids[i % len(ids)] for i in range(length)]


def _spread(windows: list[list[int]], count: int) -> list[list[int]]:
    """`count` windows evenly over all of them, so that the first long document is not all that counts."""
    if len(windows) <= count:
        return windows
    return [windows[i * len(windows) // count] for i in range(count)]
