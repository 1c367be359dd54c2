"""The release ledger: an append-only, hash-chained record of everything that was done to a registered model.

It lies in MLflow itself, so that every machine sees it: each entry is a version of the registered model
`NAME.ledger`, because numbering versions is what MLflow does one at a time, whoever asks. An entry names the digest
of the one before it; of two that name the same one, the version with the lower number counts and the other is void.
Appending is therefore a compare-and-swap, and whoever appends knows at once whether somebody was faster.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient

from edgeopt.errors import GateError, TrackingError
from edgeopt.part import canonical, digest
from edgeopt.release import registry

SUFFIX = ".ledger"
_ENTRY, _BEAT = "edgeopt.entry", "edgeopt.beat"
_SOURCE = "edgeopt-ledger:/entry"  # MLflow wants one; there are no files behind an entry
_LONGEST = 100_000  # characters in a tag of a version
_DESCRIPTION = (
    "What was registered, approved, promoted and rolled back, by whom and why. Written by edgeopt, to be read only: "
    "`edgeopt audit` finds what was changed by hand."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that was done.

    Attributes:
        place: from 1, without gaps.
        previous: digest of the entry before; empty for the first.
        kind: what was done; see edgeopt.release.history.
        at: ISO 8601, by the clock of the machine that wrote it. The order is that of `place`.
        facts: plain JSON data, by the kind.
    """

    place: int
    previous: str
    kind: str
    actor: str
    at: str
    reason: str
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "digest": self.digest}

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Raises ValueError where `data` is no entry, or not the one that its digest names."""
        try:
            entry = cls(**{name: data[name] for name in cls.__slots__})
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
        if entry.previous == head and entry.place == len(entries) + 1:
            entries.append(entry)
            head = entry.digest
            known.add(head)
        elif entry.previous not in known:
            faults.append(f"version {number} follows an entry that is not there")
    return Reading(entries=tuple(entries), faults=tuple(faults), last=last)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of the registered model `model`."""

    client: MlflowClient
    model: str

    @property
    def name(self) -> str:
        return self.model + SUFFIX

    def read(self) -> Reading:
        """All of it; empty where nothing was ever done."""
        found = registry.versions(self.client, self.name)
        return chain((int(version.version), version.tags.get(_ENTRY, "")) for version in found)

    def append(
        self, seen: Reading, *, kind: str, actor: str, reason: str, facts: Mapping[str, Any], told: str
    ) -> Reading:
        """Write an entry after the last that was `seen`; `told` says it to people.

        Raises GateError where somebody else wrote first: what was to be written does not count then.
        """
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = Entry(
            place=len(seen.entries) + 1,
            previous=seen.head,
            kind=kind,
            actor=actor,
            at=at,
            reason=reason,
            facts=facts,
        )
        text = canonical(entry.to_json())
        if len(text) > _LONGEST:
            raise TrackingError(f"an entry of {len(text)} characters is too long for {self.name}")
        if not seen.last:
            registry.ensure_model(self.client, self.name, _DESCRIPTION)
        version = self.client.create_model_version(self.name, _SOURCE, tags={_ENTRY: text}, description=told)
        number = int(version.version)
        if number == seen.last + 1:
            return replace(seen, entries=(*seen.entries, entry), last=number)
        now = self.read()
        if now.entries[entry.place - 1 : entry.place] != (entry,):
            raise GateError(
                "somebody else changed this model at the same moment, so nothing was done",
                place=self.model,
                mend=f"See `edgeopt releases {self.model}`, and run the command again",
            )
        return now

    def beat(self, sign: str) -> None:
        """Give a sign of life."""
        self.client.set_registered_model_tag(self.name, _BEAT, sign)

    def last_beat(self) -> str:
        """The sign of life that was given last."""
        return str(self.client.get_registered_model(self.name).tags.get(_BEAT, ""))
