"""What a command returns: one JSON document for stdout, and the error that decides the exit code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeopt.errors import EdgeoptError

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A command's result for stdout, and the error that ends it, if one does."""

    document: Document
    error: EdgeoptError | None = None
