"""Change a registered model one operation at a time; an interrupted operation is completed or undone.

An operation starts with a `begun` entry in the ledger and excludes all others until its `ended` entry. Changes of
aliases and removals of versions are written to the ledger before they are made. The next command can therefore
recover from a dead process: changes in the ledger are made, and without any the operation counts as undone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.protocols import Progress
from edgeopt.errors import ApprovalPendingError, GateError
from edgeopt.machine import process_identity
from edgeopt.release.ledger.actor import actor
from edgeopt.release.ledger.events import Adopted, Begun, Ended, Event, Holder, Moved, Registered, Retired
from edgeopt.release.ledger.hash_chain import LedgerState
from edgeopt.release.ledger.history import History
from edgeopt.release.ledger.ledger import Ledger
from edgeopt.release.registry import client as registry

HEARTBEAT_S = 5.0
HEARTBEAT_TIMEOUT_S = 30.0
"""Time without a heartbeat after which a process on another machine counts as dead."""
OPERATION_TAG = "edgeopt.operation"
"""Tag of a version: digest of the `begun` entry of the operation that registered it."""
MODEL_DESCRIPTION = "Engines that edgeopt compressed, measured and promoted."


class ReleaseOperation:
    """Run operations on the registered model `model` and record them in its ledger.

    All changes to a registered model go through this class. Every method that reads or writes the ledger raises
    GateError if the ledger was manipulated, if an alias was moved without the ledger, or if another operation is open.

    Attributes:
        history: state of the model after the last entry that was read or written.
    """

    def __init__(self, client: MlflowClient, model: str, progress: Progress = lambda _: None) -> None:
        self.client, self.model, self.progress = client, model, progress
        self._ledger = Ledger(client, model)
        self._state = LedgerState()
        self.history = History()
        self._applying_changes = False

    @contextlib.contextmanager
    def run(self, action: str, reason: str = "", **details: Any) -> Iterator[None]:
        """Exclude all other operations inside the block, and record its start and outcome.

        `details` are further fields of the event `Begun`.
        """
        self.recover()
        holder = Holder(
            host=process_identity.host_id(),
            machine=platform.node(),
            process=process_identity.identity(os.getpid()),
        )
        self.append(Begun(action=action, holder=holder, **details), reason)
        try:
            with _heartbeat(self._ledger, self._state.head):
                yield
        except BaseException as error:
            if not self._applying_changes:  # otherwise the next command completes the changes
                outcome = "failed"
                if isinstance(error, GateError):
                    outcome = "waiting for approval" if isinstance(error, ApprovalPendingError) else "refused"
                self.append(Ended(action=action, outcome=outcome), str(error) or type(error).__name__)
            raise
        self.append(Ended(action=action, outcome="done"))

    def append(self, event: Event, reason: str = "") -> None:
        """Append an entry to the ledger."""
        self._load(self._ledger.append(self._state, event, actor=actor(), reason=reason))

    @property
    def version_tags(self) -> dict[str, str]:
        """Return the tags that every version registered by the open operation gets."""
        assert self.history.open_operation is not None
        return {OPERATION_TAG: self.history.open_operation.entry.digest}

    def register(self, version: ModelVersion) -> None:
        """Record a version of the registry, unless the ledger already contains it."""
        if str(version.version) not in self.history.registrations:
            self.append(
                Registered(
                    version=str(version.version),
                    digest=version.tags.get(tags.ENGINE_DIGEST, ""),
                    run_id=version.run_id or "",
                    trial=version.tags.get(tags.TRIAL, ""),
                )
            )

    def move(self, aliases: Mapping[str, str]) -> dict[str, str | None]:
        """Set aliases and return, for each one that changed, its version before; None for a new alias."""
        self._applying_changes = True
        moves = {a: (self.history.aliases.get(a), v) for a, v in aliases.items() if self.history.aliases.get(a) != v}
        if moves:
            self.append(Moved(aliases=moves))
            self._set_aliases(self.history.pending_moves)
        self._applying_changes = False
        return {alias: before for alias, (before, _) in moves.items()}

    def retire(self, versions: Sequence[str]) -> None:
        """Remove versions without an alias from the registry; the ledger keeps their entries."""
        if versions:
            self._applying_changes = True
            self.append(Retired(versions=tuple(versions)))
            self._remove_retired()
            self._applying_changes = False

    def recover(self) -> History:
        """Complete or undo the operation of a dead process, and return the history."""
        self._refresh()
        if not self._state.entries:
            self._adopt("present when the ledger was created")
        drift = self.history.alias_drift(registry.aliases(self.client, self.model))
        if drift:
            raise GateError(
                drift[0],
                location=self.model,
                hint=f'Move it back in MLflow, or accept it: `edgeopt audit {self.model} --adopt --reason "…"`',
            )
        return self.history

    def adopt(self, reason: str) -> None:
        """Record the present aliases and versions of the registry as valid."""
        self._refresh()
        self._adopt(reason)

    def _refresh(self) -> None:
        self._load(self._ledger.read())
        if self._state.problems:
            raise GateError(
                f"the ledger was manipulated: {self._state.problems[0]}",
                location=self.model,
                hint=f"Find out who changed it: `edgeopt audit {self.model}`",
            )
        if self.history.open_operation is not None:
            self._finish_open_operation()

    def _adopt(self, reason: str) -> None:
        digests = {
            str(version.version): version.tags.get(tags.ENGINE_DIGEST, "")
            for version in registry.versions(self.client, self.model)
        }
        aliases = registry.aliases(self.client, self.model)
        recorded = {version: r.digest for version, r in self.history.registrations.items()}
        if aliases != self.history.aliases or digests != recorded:
            self.append(Adopted(aliases=aliases, versions=digests), reason)

    def _load(self, state: LedgerState) -> None:
        self._state, self.history = state, History.from_entries(state.entries)

    def _set_aliases(self, aliases: Mapping[str, str]) -> None:
        for alias, version in aliases.items():
            self.client.set_registered_model_alias(self.model, alias, version)

    def _remove_retired(self) -> None:
        """Remove the versions that the open operation retires."""
        for version in registry.versions(self.client, self.model):
            if str(version.version) in self.history.pending_retirements:
                _unlink_model_version(self.client, version)
                self.client.delete_model_version(self.model, version.version)

    def _finish_open_operation(self) -> None:
        """Complete or undo the open operation. Raises GateError if its process is alive."""
        operation = self.history.open_operation
        assert operation is not None
        begun, event = operation.entry, operation.event
        if self._is_alive(event.holder):
            raise GateError(
                f"{begun.actor} is running a {event.action} on {event.holder.machine} since {begun.at}",
                location=self.model,
                hint="Run the command again when it has ended",
            )
        for version in registry.versions(self.client, self.model):
            if version.tags.get(OPERATION_TAG) == begun.digest:
                self.register(version)
        has_changes = self.history.pending_moves or self.history.pending_retirements
        self._set_aliases(self.history.pending_moves)
        self._remove_retired()
        outcome = "completed" if has_changes else "undone"
        self.append(Ended(action=event.action, outcome=outcome), f"the process of {begun.actor} died")

    def _is_alive(self, holder: Holder) -> bool:
        if holder.host == process_identity.host_id():
            return process_identity.is_alive(holder.process)
        self.progress(f"waiting for a heartbeat from {holder.machine}")
        first, deadline = self._ledger.read_heartbeat(), time.monotonic() + HEARTBEAT_TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_S / 2)
            if self._ledger.read_heartbeat() != first:
                return True
        return False


def link_model_version(client: MlflowClient, version: ModelVersion, model_id: str) -> None:
    """Show the version on its logged model in the MLflow UI, as mlflow.register_model does."""
    linked = _linked_versions(client, model_id)
    if _link(version) not in linked:
        client.set_logged_model_tags(model_id, {tags.MODEL_VERSIONS: json.dumps([*linked, _link(version)])})


def _unlink_model_version(client: MlflowClient, version: ModelVersion) -> None:
    model_id = version.model_id or ""
    if model_id:
        remaining = [link for link in _linked_versions(client, model_id) if link != _link(version)]
        if remaining:
            client.set_logged_model_tags(model_id, {tags.MODEL_VERSIONS: json.dumps(remaining)})
        else:
            client.delete_logged_model_tag(model_id, tags.MODEL_VERSIONS)


def _link(version: ModelVersion) -> dict[str, str]:
    return {"name": version.name, "version": str(version.version)}


def _linked_versions(client: MlflowClient, model_id: str) -> list[dict[str, str]]:
    links: list[dict[str, str]] = json.loads(client.get_logged_model(model_id).tags.get(tags.MODEL_VERSIONS, "[]"))
    return links


@contextlib.contextmanager
def _heartbeat(ledger: Ledger, operation_digest: str) -> Iterator[None]:
    """Write heartbeats of an operation from a thread until the block ends."""
    stop = threading.Event()

    def write_heartbeats() -> None:
        for count in itertools.count():
            if stop.wait(HEARTBEAT_S):
                return
            with contextlib.suppress(MlflowException):  # a single missed heartbeat is harmless
                ledger.write_heartbeat(f"{operation_digest} {count}")

    thread = threading.Thread(target=write_heartbeats, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
