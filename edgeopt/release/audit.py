"""Audit: does everything in the registry stand in the ledger, and is the ledger whole?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core import mlflow_tags as tags
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.hash_chain import SUFFIX, Entry
from edgeopt.release.ledger.history import History
from edgeopt.release.registry import fast_reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Attributes:
    entries: the ledger, as far as its chain holds.
    faults: one sentence each; empty where all agrees.
    open: what is being done now, or was when its process died; the next command completes or undoes it.
    """

    model: str
    entries: tuple[Entry, ...]
    faults: tuple[str, ...]
    open: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "entries": [entry.to_json() for entry in self.entries]}


def audit(model: str, *, tracking_uri: str | None = None) -> Audit:
    """Hold the registry against the ledger; nothing is changed. Engines' bytes are `edgeopt verify`'s."""
    ledger, registered = fast_reader.read([model + SUFFIX, model], tracking_uri)
    reading = hash_chain.read(ledger.versions)
    history = History.of(reading.entries)
    digests = {version.number: version.tags.get(tags.ENGINE_DIGEST, "") for version in registered.versions}
    faults = [f"the ledger does not hold: {fault}" for fault in reading.faults]
    if history.open is None:
        faults += history.drift(registered.aliases)
        unknown = sorted(digests.keys() - history.registered.keys(), key=int)
        faults += [f"version {number} was registered behind the ledger's back" for number in unknown]
    for number, known in history.registered.items():
        if number not in digests:
            faults.append(f"version {number} was deleted")
        elif digests[number] != known.digest:
            faults.append(f"version {number} names another engine than was registered")
    begun = history.open
    told = "" if begun is None else f"{begun.facts['action']} by {begun.actor} since {begun.at}"
    return Audit(model=model, entries=reading.entries, faults=tuple(faults), open=told)
