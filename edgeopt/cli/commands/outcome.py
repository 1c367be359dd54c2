"""Define what a command returns: a JSON document for stdout, and the error that decides the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgeopt.errors import EdgeoptError

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a command.

    Attributes:
        document: result in plain JSON types.
        error: error that is raised after the document is printed; None if the command succeeded.
    """

    document: Document
    error: EdgeoptError | None = None


def format_json(document: Document) -> str:
    """Return a document as JSON, with one line per top-level value and per entry of a top-level list.

    Full indentation would take ten times as long. Raises ValueError for NaN and infinity.
    """
    encode = json.JSONEncoder(allow_nan=False).encode
    lines = []
    for key, value in document.items():
        entries = [f"  {encode(entry)}" for entry in value] if isinstance(value, list) else []
        lines.append(f" {encode(key)}: " + ("[\n" + ",\n".join(entries) + "\n ]" if entries else encode(value)))
    return "{\n" + ",\n".join(lines) + "\n}"
