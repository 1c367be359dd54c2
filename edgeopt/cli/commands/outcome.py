"""Define what a command returns: a JSON document for stdout, and the error that decides the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgeopt.errors import EdgeoptError

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The document of a command, and the error that it ends with, if any."""

    document: Document
    error: EdgeoptError | None = None


def written(document: Document) -> str:
    """Return a document as JSON, with one line per top-level value and per entry of a top-level list.

    Full indentation would take ten times as long.
    """
    encode = json.JSONEncoder(allow_nan=False).encode
    lines = []
    for key, value in document.items():
        entries = [f"  {encode(entry)}" for entry in value] if isinstance(value, list) else []
        lines.append(f" {encode(key)}: " + ("[\n" + ",\n".join(entries) + "\n ]" if entries else encode(value)))
    return "{\n" + ",\n".join(lines) + "\n}"
