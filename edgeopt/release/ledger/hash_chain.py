"""Define the entries of the release ledger and check the hash chain that they form.

Each entry contains the digest of the entry before it. edgeopt.release.ledger.ledger stores an entry as a version of the
registered model `NAME.ledger`. If two entries have the same predecessor, the one with the lower version number counts
and the other is void.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core.config_objects import digest
from edgeopt.release.ledger import events
from edgeopt.release.registry.types import RegisteredVersion

LEDGER_SUFFIX = ".ledger"
ENTRY_TAG = "edgeopt.entry"
"""Tag of a version that holds its ledger entry as JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the ledger.

    Attributes:
        number: position in the chain, from 1, without gaps.
        previous: digest of the entry before; empty for the first.
        kind: name of the event, see edgeopt.release.ledger.events.
        at: ISO 8601 time of the machine that wrote the entry. The order is that of `number`.
        facts: fields of the event in plain JSON types.
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

    @property
    def event(self) -> events.Event:
        """Return the recorded event. Raises ValueError if `facts` are not those of a known event."""
        return events.parse(self.kind, self.facts)

    @property
    def description(self) -> str:
        """Return the event as one sentence with its reason."""
        return events.describe(self.event, self.reason)

    def to_json(self) -> dict[str, Any]:
        """Return the entry with its digest, as the ledger stores it."""
        return {**self._content(), "digest": self.digest}

    def _content(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"place": fields.pop("number"), **fields}  # every stored ledger calls the number "place"

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Return the entry in `data`.

        Raises ValueError if a field is missing, the digest does not match, or the event is unknown.
        """
        try:
            entry = cls(**{name: data["place" if name == "number" else name] for name in cls.__slots__})
            digest_matches = entry.digest == data["digest"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a ledger entry ({error})") from error
        if not digest_matches:
            raise ValueError("the digest does not match the content")
        events.parse(entry.kind, entry.facts)
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """The content of a ledger at the time it was read.

    Attributes:
        entries: the valid entries of the chain, in order.
        problems: signs of manipulation, one sentence each.
        last_version: number of the last version of `NAME.ledger`, void entries included.
    """

    entries: tuple[Entry, ...] = ()
    problems: tuple[str, ...] = ()
    last_version: int = 0

    @property
    def head(self) -> str:
        """Return the digest of the last entry; empty if there is none."""
        return self.entries[-1].digest if self.entries else ""


def parse_chain(versions: Iterable[tuple[int, str]]) -> LedgerState:
    """Return the ledger in pairs of version number and JSON text of an entry, sorted by number.

    An entry whose predecessor already has a successor is void, because its writer was too late. A missing number is a
    deleted version. An entry without a predecessor in the chain was forged, or its predecessor was changed.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    known_digests, head, last_version = {""}, "", 0
    for number, text in versions:
        problems += [f"version {missing} was deleted" for missing in range(last_version + 1, number)]
        last_version = number
        try:
            entry = Entry.from_json(json.loads(text))
        except ValueError as error:
            problems.append(f"version {number} was changed: {error}")
            continue
        if entry.previous == head and entry.number == len(entries) + 1:
            entries.append(entry)
            head = entry.digest
            known_digests.add(head)
        elif entry.previous not in known_digests:
            problems.append(f"version {number} refers to an entry that does not exist")
    return LedgerState(entries=tuple(entries), problems=tuple(problems), last_version=last_version)


def read_chain(versions: Iterable[RegisteredVersion]) -> LedgerState:
    """Return the ledger in the versions of `NAME.ledger`, sorted by number; empty if there are none."""
    return parse_chain((int(version.number), version.tags.get(ENTRY_TAG, "")) for version in versions)
