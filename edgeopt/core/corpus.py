"""Represent calibration and evaluation texts, and check that they share no document."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from edgeopt.core.config_objects import digest
from edgeopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSummary:
    """Name, digest and size of a text, as stored in a result."""

    name: str
    digest: str
    documents: int
    characters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Ordered documents. `name` states their source.

    Raises InputError if every document is blank.
    """

    name: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if not any(document.strip() for document in self.documents):
            raise InputError("the text is empty", location=self.name, hint="Use a text with at least one document")

    @property
    def digest(self) -> str:
        """Return the digest of the documents in order. The name has no effect."""
        return digest(list(self.documents))

    def summary(self) -> TextSummary:
        """Return name, digest and size, without the documents."""
        return TextSummary(
            name=self.name,
            digest=self.digest,
            documents=len(self.documents),
            characters=sum(map(len, self.documents)),
        )


def require_disjoint(calibration: Text, evaluation: Text) -> None:
    """Raise InputError if a document is part of both texts, because quality would be measured on calibration data.

    Documents that differ only in white space are equal. Blank documents are ignored.
    """
    calibration_hashes = {_hash(document) for document in calibration.documents}
    for index, document in enumerate(evaluation.documents):
        if document.strip() and _hash(document) in calibration_hashes:
            raise InputError(
                f"document {index} ({document.strip()[:40]!r}…) is also in the calibration text {calibration.name}",
                location=evaluation.name,
                hint="Use different documents for calibration and evaluation",
            )


def _hash(document: str) -> bytes:
    return hashlib.sha256(" ".join(document.split()).encode()).digest()
