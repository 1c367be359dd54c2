"""The release desk of one registered model: one operation at a time, each completed or undone whatever kills it.

An operation begins with an entry in the ledger, which nobody else can write before it has ended. What it is about to
do to aliases is written before it is done, so the next command finishes what a dead process left: aliases that were
written are set, everything else is as it was.
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
from edgeopt.release.ledger.hash_chain import Reading
from edgeopt.release.ledger.history import History, told
from edgeopt.release.ledger.ledger import Ledger
from edgeopt.release.registry import client as registry

BEAT_S = 5.0
SILENCE_S = 30.0
"""How long a process on another machine may give no sign of life before it is taken for dead."""
OPERATION = "edgeopt.operation"
"""Tag of a version: digest of the ledger's entry that began the operation in which it was registered."""
DESCRIPTION = "Engines that edgeopt compressed, measured and promoted."


class Desk:
    """What is known of the registered model `model`, and the only way to change it.

    Raises, in every method: GateError where the ledger does not hold, where an alias was moved behind its back, or
    where somebody else is at work.
    """

    def __init__(self, client: MlflowClient, model: str, progress: Progress = lambda _: None) -> None:
        self.client, self.model, self.progress = client, model, progress
        self._ledger = Ledger(client, model)
        self._seen = Reading()
        self.history = History()
        self._moving = False

    @contextlib.contextmanager
    def operation(self, action: str, reason: str = "", **facts: Any) -> Iterator[None]:
        """Nobody else changes the model inside the block, and the ledger says how it went."""
        self.settle()
        holder = {
            "host": process_identity.host_id(),
            "machine": platform.node(),
            "process": process_identity.identity(os.getpid()),
        }
        self.note("begun", reason, action=action, holder=holder, **facts)
        try:
            with _beating(self._ledger, self._seen.head):
                yield
        except BaseException as error:
            if not self._moving:  # else the next command completes it
                outcome = "failed"
                if isinstance(error, GateError):
                    outcome = "waiting for approval" if isinstance(error, ApprovalPendingError) else "refused"
                self.note("ended", str(error) or type(error).__name__, action=action, outcome=outcome)
            raise
        self.note("ended", action=action, outcome="done")

    def note(self, kind: str, reason: str = "", **facts: Any) -> None:
        """Write into the ledger."""
        sentence = told(kind, facts, reason)
        self._know(self._ledger.append(self._seen, kind=kind, actor=actor(), reason=reason, facts=facts, told=sentence))

    @property
    def mark(self) -> dict[str, str]:
        """The tag of whatever version the operation at hand makes."""
        assert self.history.open is not None
        return {OPERATION: self.history.open.digest}

    def register(self, version: ModelVersion) -> None:
        """Enter a version of the registry, unless it is entered already."""
        if str(version.version) not in self.history.registered:
            self.note("registered", **registered(version))

    def move(self, aliases: Mapping[str, str]) -> dict[str, str | None]:
        """Let aliases point at versions: those that pointed elsewhere → the version before, None where they are new."""
        self._moving = True
        moves = {a: [self.history.aliases.get(a), v] for a, v in aliases.items() if self.history.aliases.get(a) != v}
        if moves:
            self.note("moved", aliases=moves)
            self._set(self.history.moves)
        self._moving = False
        return {alias: before for alias, (before, _) in moves.items()}

    def retire(self, versions: Sequence[str]) -> None:
        """Remove versions at which no alias points from the registry; what they did stays in the ledger."""
        if versions:
            self._moving = True
            self.note("retired", versions=list(versions))
            self._remove()
            self._moving = False

    def settle(self) -> History:
        """Everything that was done, after what a dead process left is finished."""
        self._refresh()
        if not self._seen.entries:
            self._adopt("found when the ledger was begun")
        drift = self.history.drift(registry.aliases(self.client, self.model))
        if drift:
            raise GateError(
                drift[0],
                location=self.model,
                hint=f'Move it back in MLflow, or accept it: `edgeopt audit {self.model} --adopt --reason "…"`',
            )
        return self.history

    def adopt(self, reason: str) -> None:
        """Take aliases and versions as they are, whoever made them so."""
        self._refresh()
        self._adopt(reason)

    # inside

    def _refresh(self) -> None:
        self._know(self._ledger.read())
        if self._seen.faults:
            raise GateError(
                f"its ledger does not hold: {self._seen.faults[0]}",
                location=self.model,
                hint=f"Find out who changed it: `edgeopt audit {self.model}`",
            )
        if self.history.open is not None:
            self._take_over()

    def _adopt(self, reason: str) -> None:
        found = registry.versions(self.client, self.model)
        versions = {str(v.version): v.tags.get(tags.ENGINE_DIGEST, "") for v in found}
        aliases = registry.aliases(self.client, self.model)
        known = {version: r.digest for version, r in self.history.registered.items()}
        if aliases != self.history.aliases or versions != known:
            self.note("adopted", reason, aliases=aliases, versions=versions)

    def _know(self, seen: Reading) -> None:
        self._seen, self.history = seen, History.of(seen.entries)

    def _set(self, moves: Mapping[str, str]) -> None:
        for alias, version in moves.items():
            self.client.set_registered_model_alias(self.model, alias, version)

    def _remove(self) -> None:
        """Remove the versions that the open operation retires."""
        for version in registry.versions(self.client, self.model):
            if str(version.version) in self.history.retired:
                _unlink(self.client, version)
                self.client.delete_model_version(self.model, version.version)

    def _take_over(self) -> None:
        """Finish what the open operation left; GateError where its process still lives."""
        begun = self.history.open
        assert begun is not None
        holder = begun.facts["holder"]
        if self._lives(holder):
            raise GateError(
                f"{begun.actor} is at it on {holder['machine']}: {begun.facts['action']}, since {begun.at}",
                location=self.model,
                hint="Run the command again when it has ended",
            )
        for version in registry.versions(self.client, self.model):
            if version.tags.get(OPERATION) == begun.digest:
                self.register(version)
        outcome = "completed" if self.history.moves or self.history.retired else "undone"
        self._set(self.history.moves)
        self._remove()
        self.note("ended", f"the process of {begun.actor} died", action=begun.facts["action"], outcome=outcome)

    def _lives(self, holder: Mapping[str, str]) -> bool:
        if holder["host"] == process_identity.host_id():
            return process_identity.is_alive(holder["process"])
        self.progress(f"watching for signs of life from {holder['machine']}")
        first, end = self._ledger.last_beat(), time.monotonic() + SILENCE_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 2)
            if self._ledger.last_beat() != first:
                return True
        return False


def link(client: MlflowClient, version: ModelVersion, model_id: str) -> None:
    """Let the UI show on a logged model that it is registered, as MLflow's own register_model does."""
    linked = _linked(client, model_id)
    if _as_linked(version) not in linked:
        client.set_logged_model_tags(model_id, {tags.MODEL_VERSIONS: json.dumps([*linked, _as_linked(version)])})


def _unlink(client: MlflowClient, version: ModelVersion) -> None:
    model_id = version.model_id or ""
    if model_id:
        left = [one for one in _linked(client, model_id) if one != _as_linked(version)]
        if left:
            client.set_logged_model_tags(model_id, {tags.MODEL_VERSIONS: json.dumps(left)})
        else:
            client.delete_logged_model_tag(model_id, tags.MODEL_VERSIONS)


def _as_linked(version: ModelVersion) -> dict[str, str]:
    return {"name": version.name, "version": str(version.version)}


def _linked(client: MlflowClient, model_id: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(client.get_logged_model(model_id).tags.get(tags.MODEL_VERSIONS, "[]"))
    return found


def registered(version: ModelVersion) -> dict[str, Any]:
    """What the ledger keeps of a version."""
    return {
        "version": str(version.version),
        "digest": version.tags.get(tags.ENGINE_DIGEST, ""),
        "run_id": version.run_id or "",
        "trial": version.tags.get(tags.TRIAL, ""),
    }


@contextlib.contextmanager
def _beating(ledger: Ledger, begun: str) -> Iterator[None]:
    """Signs of life of the operation `begun` for as long as the block lasts."""
    end = threading.Event()

    def beat() -> None:
        for count in itertools.count():
            if end.wait(BEAT_S):
                return
            with contextlib.suppress(MlflowException):  # one sign that is not given is no harm
                ledger.beat(f"{begun} {count}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
