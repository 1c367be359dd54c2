"""Store the release ledger: an append-only, hash-chained record of all changes to a registered model.

The ledger is stored in MLflow, where every machine sees it: each entry is a version of the registered model
`NAME.ledger`, because MLflow assigns version numbers one at a time. An entry contains the digest of the one before it,
and of two entries with the same predecessor the first counts (see hash_chain). Appending is therefore a
compare-and-swap: the writer detects at once that another one was faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from mlflow import MlflowClient

from edgeopt.core.config_objects import canonical_json
from edgeopt.errors import GateError, TrackingError
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.events import Event
from edgeopt.release.ledger.hash_chain import ENTRY_TAG, LEDGER_SUFFIX, Entry, LedgerState
from edgeopt.release.registry import client as registry

_HEARTBEAT_TAG = "edgeopt.beat"
_SOURCE = "edgeopt-ledger:/entry"  # MLflow requires a source, but an entry has no files
_MAX_ENTRY_CHARACTERS = 100_000  # limit of a version's tag
_DESCRIPTION = (
    "Record of everything that was registered, approved, promoted and rolled back, with user and reason. Written by "
    "edgeopt; do not edit. `edgeopt audit` detects manual changes."
)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of the registered model `model`."""

    client: MlflowClient
    model: str

    @property
    def name(self) -> str:
        """Return the name of the registered model that stores the ledger."""
        return self.model + LEDGER_SUFFIX

    def read(self) -> LedgerState:
        """Return all entries; the state is empty if nothing was recorded."""
        return hash_chain.read_chain(registry.read_model(self.client, self.name).versions)

    def append(self, state: LedgerState, event: Event, *, actor: str, reason: str) -> LedgerState:
        """Write an entry after the last one in `state` and return the new state.

        Raises:
            GateError: another writer appended first; the entry is void.
            TrackingError: the entry is too long.
        """
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = Entry(
            number=len(state.entries) + 1,
            previous=state.head,
            kind=event.KIND,
            actor=actor,
            at=at,
            reason=reason,
            facts=event.to_json(),
        )
        text = canonical_json(entry.to_json())
        if len(text) > _MAX_ENTRY_CHARACTERS:
            raise TrackingError(
                f"a ledger entry must have at most {_MAX_ENTRY_CHARACTERS} characters, got {len(text)}",
                location=self.name,
            )
        if not state.last_version:
            registry.ensure_model(self.client, self.name, _DESCRIPTION)
        version = self.client.create_model_version(
            self.name, _SOURCE, tags={ENTRY_TAG: text}, description=entry.description
        )
        number = int(version.version)
        if number == state.last_version + 1:
            return replace(state, entries=(*state.entries, entry), last_version=number)
        present = self.read()
        if present.entries[entry.number - 1 : entry.number] != (entry,):
            raise GateError(
                "another user changed this model at the same moment, so nothing was done",
                location=self.model,
                hint=f"See `edgeopt releases {self.model}`, and run the command again",
            )
        return present

    def write_heartbeat(self, heartbeat: str) -> None:
        """Store a heartbeat of the process that runs the open operation."""
        self.client.set_registered_model_tag(self.name, _HEARTBEAT_TAG, heartbeat)

    def read_heartbeat(self) -> str:
        """Return the last heartbeat; empty if there is none."""
        return str(self.client.get_registered_model(self.name).tags.get(_HEARTBEAT_TAG, ""))
