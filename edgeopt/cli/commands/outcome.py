"""What a command returns: one JSON document for stdout, and the error that decides the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgeopt.errors import EdgeoptError

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A command's result for stdout, and the error that ends it, if one does."""

    document: Document
    error: EdgeoptError | None = None


def written(document: Document) -> str:
    """A document as JSON, a line for each value at its top and for each entry of a list there.

    Indented further it would be written ten times as slowly.
    """
    encode = json.JSONEncoder(allow_nan=False).encode
    lines = []
    for key, value in document.items():
        entries = [f"  {encode(entry)}" for entry in value] if isinstance(value, list) else []
        lines.append(f" {encode(key)}: " + ("[\n" + ",\n".join(entries) + "\n ]" if entries else encode(value)))
    return "{\n" + ",\n".join(lines) + "\n}"
