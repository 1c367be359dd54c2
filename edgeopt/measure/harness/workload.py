"""Build the workload of a measurement: prompts of fixed lengths and evaluation windows."""

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
"""Supported prompt lengths in tokens; each has its own metric for the time to first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Token ids that an engine processes while it is measured.

    Attributes:
        context_length: largest number of tokens of a sequence, prompt and generated tokens together.
        prompts: token ids of a prompt by its length.
        documents: token ids of the evaluation windows; each is evaluated with an empty KV cache.
        skipped_prompt_lengths: prompt lengths that do not fit the context with one generated token.
    """

    context_length: int
    prompts: dict[int, list[int]]
    documents: list[list[int]]
    skipped_prompt_lengths: tuple[int, ...]


def build_workload(
    evaluation: Text,
    directory: Path,
    *,
    context_length: int,
    prompt_lengths: Sequence[int],
    window_tokens: int,
    max_windows: int,
) -> Workload:
    """Build the workload for the tokenizer in `directory`; the same arguments give the same workload.

    Raises InputError if no document has 16 tokens, and ConfigError if no prompt fits the context.
    """
    fitting = [length for length in sorted(prompt_lengths) if length < context_length]
    if not fitting:
        raise ConfigError(
            f"at least one of `prompt_lengths` must be shorter than the context of {context_length} tokens, "
            f"got {list(prompt_lengths)}",
            location="measure.prompt_lengths",
            hint="Add a shorter length",
        )
    request = _WindowRequest(
        text=evaluation,
        tokenizer_digest=_tokenizer_digest(directory),
        length=min(window_tokens, context_length),
        directory=directory,
    )
    windows, prefix = _tokenize(request)
    stream = [token for window in windows for token in window[len(prefix) :]]
    return Workload(
        context_length=context_length,
        prompts={length: repeat_to_length(prefix + stream, length) for length in fitting},
        documents=_select_evenly(windows, max_windows),
        skipped_prompt_lengths=tuple(sorted(set(prompt_lengths) - set(fitting))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _WindowRequest:
    """Cache key of `_tokenize`: equal for the same tokenizer files in different folders."""

    text: Text
    tokenizer_digest: str
    length: int
    directory: Path = field(compare=False)


@lru_cache(maxsize=1)
def _tokenize(request: _WindowRequest) -> tuple[list[list[int]], list[int]]:
    """Return the windows and their common prefix. The cache serves all probe groups of one evaluation."""
    from edgeopt.checkpoints import tokenizer as tokens

    windows = tokens.windows(request.text, request.directory, length=request.length)
    return windows, tokens.prefix_ids(request.directory)


def _tokenizer_digest(directory: Path) -> str:
    from hashlib import sha256  # imported here: it needs 5 MiB, and the measured process imports this module

    from edgeopt.checkpoints import tokenizer as tokens

    combined = sha256()
    for name in tokens.FILES:
        path = directory / name
        combined.update(path.read_bytes() if path.is_file() else b"\0")
    return combined.hexdigest()


def repeat_to_length(ids: Sequence[int], length: int) -> list[int]:
    """Repeat `ids` until the result has `length` ids."""
    return [ids[i % len(ids)] for i in range(length)]


def _select_evenly(windows: list[list[int]], count: int) -> list[list[int]]:
    """Select `count` evenly spaced windows, so that a long first document does not dominate."""
    if len(windows) <= count:
        return windows
    return [windows[i * len(windows) // count] for i in range(count)]
