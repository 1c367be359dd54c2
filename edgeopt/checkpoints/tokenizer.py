"""Text to token ids and back, by the tokenizer that travels with every checkpoint and engine."""

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


def load(directory: Path) -> Tokenizer:
    """The fast tokenizer in `directory`. Raises InputError where it is absent or broken."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "the model has no tokenizer.json",
            location=str(directory),
            hint="Put the model's tokenizer.json beside its weights",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"the tokenizer cannot be read ({error})", location=str(path)) from error


def prefix(directory: Path) -> list[int]:
    """The ids that the model expects before a text: its beginning-of-sequence token, or none."""
    tokenizer = load(directory)
    added = tokenizer.encode("").ids
    path = directory / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"it is no JSON ({error})", location=str(path), hint="Copy the file again") from error
    if added or not config.get("add_bos_token"):
        return list(added)
    begin = config.get("bos_token")
    name = begin.get("content") if isinstance(begin, dict) else begin
    number = tokenizer.token_to_id(name) if name else None
    return [] if number is None else [number]


def eos_token_ids(directory: Path) -> frozenset[int]:
    """End-of-sequence ids from `generation_config.json` or, without it, `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            ends = json.loads(path.read_text()).get("eos_token_id")
            if ends is not None:
                return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def windows(text: Text, directory: Path, *, length: int, limit: int | None = None) -> list[list[int]]:
    """`text` as windows of at most `length` ids, each beginning with the model's prefix.

    A document longer than a window goes on in the next one; pieces below 16 ids are left out.
    Raises InputError where not one window of 16 ids comes out.
    """
    return list(_pieces(text.documents, directory, length, limit)) or _refuse(text)


def _pieces(documents: Iterable[str], directory: Path, length: int, limit: int | None) -> Iterable[list[int]]:
    tokenizer, begin = load(directory), prefix(directory)
    step, count = length - len(begin), 0
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        for start in range(0, len(ids), step):
            piece = begin + ids[start : start + step]
            if len(piece) < 16:
                continue
            if limit is not None and count >= limit:
                return
            count += 1
            yield piece


def _refuse(text: Text) -> list[list[int]]:
    raise InputError("the text is shorter than 16 tokens", location=text.name, hint="Give a longer text")
