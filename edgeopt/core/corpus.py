"""Texts that calibrate and evaluate: documents with a digest, and the rule that they never overlap."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from edgeopt.core.config_objects import digest
from edgeopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Documents in order; `name` says where they come from."""

    name: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if not any(document.strip() for document in self.documents):
            raise InputError("the text is empty", location=self.name, hint="Give a file with at least one document")

    @property
    def digest(self) -> str:
        return digest(list(self.documents))

    def summary(self) -> dict[str, Any]:
        """What it is, in plain JSON types, without the text itself."""
        return {
            "name": self.name,
            "digest": self.digest,
            "documents": len(self.documents),
            "characters": sum(map(len, self.documents)),
        }


def require_disjoint(calibration: Text, evaluation: Text) -> None:
    """InputError where a document stands in both texts: quality would be measured on what was seen."""
    seen = {_fingerprint(document) for document in calibration.documents}
    for number, document in enumerate(evaluation.documents):
        if _fingerprint(document) in seen:
            raise InputError(
                f"document {number} ({document.strip()[:40]!r}…) is also in the calibration text {calibration.name}",
                location=evaluation.name,
                hint="Calibrate and evaluate on different documents",
            )


def _fingerprint(document: str) -> bytes:
    return hashlib.sha256(" ".join(document.split()).encode()).digest()
