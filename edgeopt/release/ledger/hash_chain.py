"""The release ledger's entries, each of which names the digest of the one before it.

An entry is a version of the registered model `NAME.ledger`, written by edgeopt.release.ledger.ledger. If two entries
name the same predecessor, the one with the lower version number counts and the other is void.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core.config_objects import digest
from edgeopt.release.registry.types import Version

SUFFIX = ".ledger"
ENTRY = "edgeopt.entry"
"""Tag of a version: its entry, as JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the ledger.

    Attributes:
        number: position in the chain, from 1, without gaps.
        previous: digest of the entry before; empty for the first.
        kind: type of the entry, see edgeopt.release.ledger.history.
        at: ISO 8601 time of the machine that wrote the entry. The order is that of `number`.
        facts: plain JSON data; the keys depend on `kind`.
    """

    number: int
    previous: str
    kind: str
    actor: str
    at: str
    reason: str
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Return the sha256 of the entry, to which the next entry refers."""
        return digest(self._content())

    def to_json(self) -> dict[str, Any]:
        """Return the entry with its digest, as the ledger stores it."""
        return {**self._content(), "digest": self.digest}

    def _content(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"place": fields.pop("number"), **fields}  # every stored ledger calls the number "place"

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Raises ValueError where `data` is no entry, or not the one that its digest names."""
        try:
            entry = cls(**{name: data["place" if name == "number" else name] for name in cls.__slots__})
            same = entry.digest == data["digest"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no entry ({error})") from error
        if not same:
            raise ValueError("its digest is that of another text")
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A ledger as it was read.

    Attributes:
        entries: the chain as far as it holds.
        faults: what speaks against it, one sentence each.
        last: number of the last version, void ones too.
    """

    entries: tuple[Entry, ...] = ()
    faults: tuple[str, ...] = ()
    last: int = 0

    @property
    def head(self) -> str:
        """Digest of the last entry; empty where there is none."""
        return self.entries[-1].digest if self.entries else ""


def chain(numbered: Iterable[tuple[int, str]]) -> Reading:
    """The chain in pairs of a version's number and its entry's JSON text, the numbers ascending.

    What names an entry that already has a successor is void: somebody was late. A number that is missing was deleted,
    and what names no entry of the chain was forged, or the one before it was changed.
    """
    entries: list[Entry] = []
    faults: list[str] = []
    known, head, last = {""}, "", 0
    for number, text in numbered:
        faults += [f"version {gone} was deleted" for gone in range(last + 1, number)]
        last = number
        try:
            entry = Entry.from_json(json.loads(text))
        except ValueError as error:
            faults.append(f"version {number} was changed: {error}")
            continue
        if entry.previous == head and entry.number == len(entries) + 1:
            entries.append(entry)
            head = entry.digest
            known.add(head)
        elif entry.previous not in known:
            faults.append(f"version {number} follows an entry that is not there")
    return Reading(entries=tuple(entries), faults=tuple(faults), last=last)


def read(versions: Iterable[Version]) -> Reading:
    """The chain in the versions of `NAME.ledger`, by number; empty where nothing was ever done."""
    return chain((int(version.number), version.tags.get(ENTRY, "")) for version in versions)
