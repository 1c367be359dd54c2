"""A local text file: `.txt` is one document, `.jsonl` holds one {"text": …} a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """The documents of `path`, at most the first `documents` of them (0 takes all)."""

    path: str
    documents: int = 0

    def __post_init__(self) -> None:
        if self.documents < 0:
            raise ConfigError(
                f"{self.documents} documents cannot be taken", location="documents", hint="Give 0 or more"
            )

    def load(self) -> Text:
        path = Path(self.path).expanduser()
        found = read_documents(path)
        return Text(name=str(path), documents=tuple(found[: self.documents or None]))


def read_documents(path: Path) -> list[str]:
    """All documents of a .txt or .jsonl file. Raises InputError naming file and line."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"{path.suffix or 'no suffix'} is not a text format", location=str(path), hint="Give .txt or .jsonl"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("there is no such file", location=str(path), hint="Give an existing file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the text cannot be read ({error})", location=str(path), hint="Give a readable UTF-8 file"
        ) from error
    if path.suffix == ".txt":
        return [content]
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            if not isinstance(document, str):
                raise TypeError(document)
            documents.append(document)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                'the line is no {"text": …} object', location=f"{path}:{number}", hint="Give one JSON object a line"
            ) from error
    return documents
