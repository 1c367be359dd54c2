"""Load a local text file: `.txt` with one document, or `.jsonl` with one {"text": …} object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """Text file.

    Attributes:
        path: file that ends in .txt or .jsonl.
        documents: number of documents to read from the start; 0 for all.
    """

    path: str
    documents: int = 0

    def __post_init__(self) -> None:
        if self.documents < 0:
            raise ConfigError(
                f"`documents` must not be negative, got {self.documents}",
                location="documents",
                hint="Use 0 for all documents",
            )

    def load(self) -> Text:
        """Return the documents. Raises InputError if the file is missing, invalid or blank."""
        path = Path(self.path).expanduser()
        documents = read_documents(path)
        return Text(name=str(path), documents=tuple(documents[: self.documents or None]))


def read_documents(path: Path) -> list[str]:
    """Return all documents of a .txt or .jsonl file. Raises InputError with file and line."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"the file must end in .txt or .jsonl, got {path.suffix or 'no suffix'}",
            location=str(path),
            hint="Convert the text to one of these formats",
        )
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("the file does not exist", location=str(path), hint="Correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the text cannot be read ({error})", location=str(path), hint="Use a readable UTF-8 file"
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
                'the line must be a JSON object {"text": "…"}',
                location=f"{path}:{number}",
                hint="Write one JSON object per line",
            ) from error
    return documents
