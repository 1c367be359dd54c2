"""Load the tokenizer of a checkpoint or an engine, and split texts into windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgeopt.core.corpus import Text

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja")
MIN_WINDOW = 16
"""Minimum number of token ids in a window."""


def load(directory: Path) -> Tokenizer:
    """Load the fast tokenizer in `directory`. Raises InputError if it is missing or invalid."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "the folder has no tokenizer.json",
            location=str(directory),
            hint="Copy the model's tokenizer.json next to its weights",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"the tokenizer cannot be read ({error})", location=str(path), hint="Copy the file again"
        ) from error


def prefix_ids(directory: Path) -> list[int]:
    """Return the token ids that the model expects before a text: the beginning-of-sequence token, or none.

    Raises InputError if the tokenizer is missing or invalid.
    """
    tokenizer = load(directory)
    added_by_tokenizer = tokenizer.encode("").ids
    path = directory / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"the file is not valid JSON ({error})", location=str(path), hint="Copy it again") from error
    if added_by_tokenizer or not config.get("add_bos_token"):
        return list(added_by_tokenizer)
    bos_token = config.get("bos_token")
    content = bos_token.get("content") if isinstance(bos_token, dict) else bos_token
    token_id = tokenizer.token_to_id(content) if content else None
    return [] if token_id is None else [token_id]


def eos_token_ids(directory: Path) -> frozenset[int]:
    """Return the end-of-sequence ids from `generation_config.json`, or else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            ids = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def windows(text: Text, directory: Path, *, length: int, limit: int | None = None) -> list[list[int]]:
    """Split `text` into windows of at most `length` token ids, each starting with the model's prefix.

    A longer document continues in the next window. Windows with fewer than 16 ids are dropped.

    Args:
        text: documents to tokenize.
        directory: folder of the tokenizer.
        length: maximum number of token ids in a window, including the prefix.
        limit: maximum number of windows; None for all.

    Raises:
        InputError: no document has 16 token ids, including the prefix.
    """
    all_windows = list(_windows(text.documents, directory, length, limit))
    if not all_windows:
        tokenizer, prefix = load(directory), prefix_ids(directory)
        longest = max((len(tokenizer.encode(d, add_special_tokens=False).ids) for d in text.documents), default=0)
        raise InputError(
            f"the longest document must have at least {MIN_WINDOW} token ids, got {len(prefix) + longest}",
            location=text.name,
            hint="Use a longer text",
        )
    return all_windows


def _windows(documents: Iterable[str], directory: Path, length: int, limit: int | None) -> Iterable[list[int]]:
    tokenizer, prefix = load(directory), prefix_ids(directory)
    stride, count = length - len(prefix), 0
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        for start in range(0, len(ids), stride):
            window = prefix + ids[start : start + stride]
            if len(window) < MIN_WINDOW:
                continue
            if limit is not None and count >= limit:
                return
            count += 1
            yield window
