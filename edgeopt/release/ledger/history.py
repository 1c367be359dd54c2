"""Derive the state of a registered model from its ledger: aliases, registrations, approvals, the open operation.

Kinds of entries:

- adopted: aliases and versions that existed before the ledger, or that a user accepted with `edgeopt audit --adopt`
- begun: start of an operation, with the process that runs it; the next operation starts after this one has ended
- judged: the gates' verdicts on the candidates
- registered: a version, with the digest of its engine
- approved: a person's approval of a version, bound to the digest of its engine
- revoked: withdrawal of an approval, by the person who gave it
- retired: versions that the policy no longer keeps; written before they are removed
- moved: aliases, from one version to another; written before they are set
- ended: end of an operation: done, refused or failed; or completed or undone by another process
- posted: message about a move to a webhook, delivered or not
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.core.redaction import redact_password
from edgeopt.release.ledger.hash_chain import Entry

ROLLBACK = "rollback"
"""Action of the operation that moves an alias back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Record of a registered version: user, time, and digest of the engine at that time."""

    actor: str
    at: str
    digest: str


@dataclass(slots=True, kw_only=True)
class History:
    """State of a registered model after all entries of its ledger.

    Attributes:
        aliases: alias to version.
        alias_stacks: alias to its versions, the present one last. A rollback removes the version that it leaves.
        past_versions: alias to every version that it ever pointed at, in order.
        registrations: version to its registration.
        approvals: version to the entries that approve it.
        open_operation: the `begun` entry of the operation that has not ended.
        pending_moves: alias to version, as written by the open operation.
        pending_retirements: versions that the open operation retires.
        undelivered: URL of a webhook to the (begun, moved) entries whose message was not delivered.
    """

    aliases: dict[str, str] = field(default_factory=dict)
    alias_stacks: dict[str, list[str]] = field(default_factory=dict)
    past_versions: dict[str, list[str]] = field(default_factory=dict)
    registrations: dict[str, Registration] = field(default_factory=dict)
    approvals: dict[str, list[Entry]] = field(default_factory=dict)
    open_operation: Entry | None = None
    pending_moves: dict[str, str] = field(default_factory=dict)
    pending_retirements: set[str] = field(default_factory=set)
    undelivered: dict[str, list[tuple[Entry, Entry]]] = field(default_factory=dict)

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> History:
        """Return the state after applying `entries` in order."""
        history = cls()
        for entry in entries:
            history._apply(entry)
        return history

    def _apply(self, entry: Entry) -> None:
        facts = entry.facts
        match entry.kind:
            case "begun":
                self.open_operation, self.pending_moves, self.pending_retirements = entry, {}, set()
            case "ended":
                self.open_operation, self.pending_moves, self.pending_retirements = None, {}, set()
            case "registered":
                self._register(entry, {facts["version"]: facts["digest"]})
            case "approved":
                self.approvals.setdefault(facts["version"], []).append(entry)
            case "revoked":
                approvals = self.approvals.get(facts["version"], [])
                approvals[:] = [approval for approval in approvals if approval.actor != entry.actor]
            case "moved":
                self._move(entry)
            case "retired":
                self._retire(set(facts["versions"]))
            case "posted" if facts["delivered"]:
                waiting = self.undelivered.get(facts["url"], [])
                self.undelivered[facts["url"]] = [pair for pair in waiting if pair[1].digest != facts["entry"]]
            case "adopted":
                self._adopt(entry)

    def _move(self, entry: Entry) -> None:
        self.pending_moves = {alias: to for alias, (_, to) in entry.facts["aliases"].items()}
        operation = self.open_operation
        self._point(self.pending_moves, back=operation is not None and operation.facts["action"] == ROLLBACK)
        if operation is not None:
            for url in operation.facts.get("webhooks", ()):
                self.undelivered.setdefault(url, []).append((operation, entry))

    def _retire(self, versions: set[str]) -> None:
        self.pending_retirements = versions
        self.registrations = {v: r for v, r in self.registrations.items() if v not in versions}
        for stack in self.alias_stacks.values():
            stack[:] = [version for version in stack if version not in versions]

    def _adopt(self, entry: Entry) -> None:
        """Take over the entry's aliases and versions. Versions with an unchanged digest keep their registration."""
        aliases, digests = entry.facts["aliases"], entry.facts["versions"]
        self.aliases = {}
        self._point(aliases)
        unchanged = {v: r for v, r in self.registrations.items() if digests.get(v) == r.digest}
        self._register(entry, digests)
        self.registrations = {v: unchanged.get(v, self.registrations[v]) for v in digests}

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
        return {entry.actor for entry in self.approvals.get(version, ()) if entry.facts["digest"] == digest}

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


def describe(kind: str, facts: Mapping[str, Any], reason: str) -> str:
    """Return an entry as one sentence, for the MLflow UI and `edgeopt releases`."""
    sentence = _DESCRIPTIONS[kind](facts)
    return f"{sentence}: {reason}" if reason else sentence


def _describe_moves(facts: Mapping[str, Any]) -> str:
    moves = (f"{alias} from {old or 'nothing'} to {new}" for alias, (old, new) in facts["aliases"].items())
    return f"moved {', '.join(moves)}"


def _list(noun: str, names: Collection[str]) -> str:
    return f"{noun if len(names) == 1 else noun + 's'} {', '.join(names) or 'none'}"


_DESCRIPTIONS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "adopted": lambda f: f"adopted {', '.join(f'{a} = {v}' for a, v in f['aliases'].items()) or 'no alias'}",
    "begun": lambda f: f"began {f['action']}",
    "judged": lambda f: f"checked {_list('trial', sorted(f['verdicts'], key=int))} by policy {f['policy']}",
    "registered": lambda f: f"registered version {f['version']}, engine {f['digest'][:12]}…",
    "approved": lambda f: f"approved version {f['version']}, engine {f['digest'][:12]}…",
    "revoked": lambda f: f"revoked the approval of version {f['version']}",
    "moved": _describe_moves,
    "retired": lambda f: f"retired {_list('version', f['versions'])}",
    "posted": lambda f: f"notified {redact_password(f['url'])}" if f["delivered"] else "failed to notify a webhook",
    "ended": lambda f: f"ended {f['action']}, {f['outcome']}",
}
