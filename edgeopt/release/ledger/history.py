"""Derive the state of a registered model from its ledger: aliases, registrations, approvals, the open operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgeopt.release.ledger.events import (
    Adopted,
    Approved,
    Begun,
    Ended,
    Moved,
    Posted,
    Registered,
    Retired,
    Revoked,
)
from edgeopt.release.ledger.hash_chain import Entry

ROLLBACK = "rollback"
"""Action of the operation that moves an alias back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Record of a registered version: user, time, and digest of the engine at that time."""

    actor: str
    at: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """Record of an approval: user, and digest of the engine at that time."""

    actor: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Start of an operation: its entry in the ledger, and the event of that entry."""

    entry: Entry
    event: Begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """Message about moved aliases that webhooks receive: the operation, and the entry with its moves."""

    operation: Operation
    entry: Entry
    event: Moved


@dataclass(slots=True, kw_only=True)
class History:
    """State of a registered model after all entries of its ledger.

    Attributes:
        aliases: alias to version.
        alias_stacks: alias to its versions, the present one last. A rollback removes the version that it leaves.
        past_versions: alias to every version that it ever pointed at, in order.
        registrations: version to its registration.
        approvals: version to its approvals.
        open_operation: the operation that has not ended; None if there is none.
        pending_moves: alias to version, as written by the open operation.
        pending_retirements: versions that the open operation retires.
        undelivered: URL of a webhook to the messages that were not delivered, in order.
    """

    aliases: dict[str, str] = field(default_factory=dict)
    alias_stacks: dict[str, list[str]] = field(default_factory=dict)
    past_versions: dict[str, list[str]] = field(default_factory=dict)
    registrations: dict[str, Registration] = field(default_factory=dict)
    approvals: dict[str, list[Approval]] = field(default_factory=dict)
    open_operation: Operation | None = None
    pending_moves: dict[str, str] = field(default_factory=dict)
    pending_retirements: set[str] = field(default_factory=set)
    undelivered: dict[str, list[Notification]] = field(default_factory=dict)

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> History:
        """Return the state after applying `entries` in order."""
        history = cls()
        for entry in entries:
            history._apply(entry)
        return history

    def _apply(self, entry: Entry) -> None:
        match entry.event:
            case Begun() as event:
                self._set_operation(Operation(entry=entry, event=event))
            case Ended():
                self._set_operation(None)
            case Registered(version=version, digest=digest):
                self._register(entry, {version: digest})
            case Approved(version=version, digest=digest):
                self.approvals.setdefault(version, []).append(Approval(actor=entry.actor, digest=digest))
            case Revoked(version=version):
                approvals = self.approvals.get(version, [])
                approvals[:] = [approval for approval in approvals if approval.actor != entry.actor]
            case Moved() as event:
                self._move(entry, event)
            case Retired(versions=versions):
                self._retire(set(versions))
            case Posted(url=url, entry=digest, delivered=True):
                waiting = self.undelivered.get(url, [])
                self.undelivered[url] = [message for message in waiting if message.entry.digest != digest]
            case Adopted() as event:
                self._adopt(entry, event)

    def _set_operation(self, operation: Operation | None) -> None:
        self.open_operation, self.pending_moves, self.pending_retirements = operation, {}, set()

    def _move(self, entry: Entry, event: Moved) -> None:
        self.pending_moves = {alias: to for alias, (_, to) in event.aliases.items()}
        operation = self.open_operation
        self._point(self.pending_moves, back=operation is not None and operation.event.action == ROLLBACK)
        if operation is not None:
            for url in operation.event.webhooks:
                message = Notification(operation=operation, entry=entry, event=event)
                self.undelivered.setdefault(url, []).append(message)

    def _retire(self, versions: set[str]) -> None:
        self.pending_retirements = versions
        self.registrations = {v: r for v, r in self.registrations.items() if v not in versions}
        for stack in self.alias_stacks.values():
            stack[:] = [version for version in stack if version not in versions]

    def _adopt(self, entry: Entry, event: Adopted) -> None:
        """Take over the event's aliases and versions. Versions with an unchanged digest keep their registration."""
        self.aliases = {}
        self._point(event.aliases)
        unchanged = {v: r for v, r in self.registrations.items() if event.versions.get(v) == r.digest}
        self._register(entry, event.versions)
        self.registrations = {v: unchanged.get(v, self.registrations[v]) for v in event.versions}

    def _register(self, entry: Entry, digests: Mapping[str, str]) -> None:
        self.registrations |= {
            version: Registration(actor=entry.actor, at=entry.at, digest=digest) for version, digest in digests.items()
        }

    def _point(self, moves: Mapping[str, str], *, back: bool = False) -> None:
        for alias, version in moves.items():
            stack = self.alias_stacks.setdefault(alias, [])
            if back and version in stack:
                rolled_back = self.aliases.get(alias)
                stack[:] = [v for v in stack[: stack.index(version)] if v != rolled_back]
            stack.append(version)
            self.past_versions.setdefault(alias, []).append(version)
            self.aliases[alias] = version

    def approvers(self, version: str, digest: str) -> set[str]:
        """Return the users who approved a version while its engine had this digest."""
        return {approval.actor for approval in self.approvals.get(version, ()) if approval.digest == digest}

    def alias_drift(self, actual: Mapping[str, str]) -> list[str]:
        """Return one sentence for each alias that differs from the ledger; `actual` maps alias to version."""
        pairs = ((alias, actual.get(alias), self.aliases.get(alias)) for alias in sorted({*actual, *self.aliases}))
        return [
            f"alias {alias} points at {present or 'nothing'}, but the ledger says {recorded or 'nothing'}"
            for alias, present, recorded in pairs
            if present != recorded
        ]

    def previous_version(self, alias: str) -> str | None:
        """Return the version to which a rollback of `alias` goes; None if there is none."""
        earlier = [version for version in self.alias_stacks.get(alias, []) if version != self.aliases.get(alias)]
        return earlier[-1] if earlier else None
