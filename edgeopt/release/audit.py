"""Audit: does everything in the registry stand in the ledger, and is the ledger whole?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgeopt import tags
from edgeopt.ports import Progress
from edgeopt.release import registry
from edgeopt.release.desk import Desk, drifted
from edgeopt.release.history import History
from edgeopt.release.ledger import Entry, Ledger


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
    with registry.answering(tracking_uri) as client:
        reading = Ledger(client, model).read()
        history = History.of(reading.entries)
        versions = {str(version.version): version for version in registry.versions(client, model)}
        faults = [f"the ledger does not hold: {fault}" for fault in reading.faults]
        if history.open is None:
            faults += drifted(registry.aliases(client, model), history.aliases)
            unknown = sorted(versions.keys() - history.registered.keys(), key=int)
            faults += [f"version {number} was registered behind the ledger's back" for number in unknown]
        for number, known in history.registered.items():
            if number not in versions:
                faults.append(f"version {number} was deleted")
            elif versions[number].tags.get(tags.ENGINE_DIGEST, "") != known.digest:
                faults.append(f"version {number} names another engine than was registered")
    begun = history.open
    told = "" if begun is None else f"{begun.facts['action']} by {begun.actor} since {begun.at}"
    return Audit(model=model, entries=reading.entries, faults=tuple(faults), open=told)


def adopt(model: str, reason: str, *, tracking_uri: str | None = None, progress: Progress = lambda _: None) -> Audit:
    """Enter aliases and versions as they are, whoever made them so. GateError where the ledger itself does not hold."""
    with registry.answering(tracking_uri) as client:
        Desk(client, model, progress).adopt(reason)
    return audit(model, tracking_uri=tracking_uri)
