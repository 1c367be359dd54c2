"""What a ledger's entries add up to: where aliases point, what was approved, and what is being done now.

- adopted: aliases and versions that were there before the ledger, or that an auditor accepted
- begun: an operation, and the process that does it; none begins before this one has ended
- judged: what the gates said of the candidates
- registered: a version, with the digest of its engine
- approved: a version by a person, bound to the digest of its engine
- revoked: the approval of a version, by the person who gave it
- retired: versions that are removed because the policy keeps no more; written before they are
- moved: aliases, from one version to another; written before they are set
- ended: the operation, as done, refused or failed, or by another process as completed or undone
- posted: a move to a webhook, delivered or not
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.core.redaction import redact_password
from edgeopt.release.ledger.hash_chain import Entry

ROLLBACK = "rollback"
"""The action whose moves go back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Who registered a version, when, and the digest of its engine then."""

    actor: str
    at: str
    digest: str


@dataclass(slots=True, kw_only=True)
class History:
    """Attributes:
    aliases: alias → the version that it points at.
    held: alias → the versions that it pointed at, the present one last; what was rolled back is no longer among them.
    pointed: alias → every version that it ever pointed at, in order.
    registered: version → its registration.
    approvals: version → the entries that approve it.
    open: the operation that has begun and not ended.
    moves: of that one, alias → version, once they are written.
    retired: of that one, versions, once they are written.
    undelivered: address of a webhook → the operations and moves that it was not told of.
    """

    aliases: dict[str, str] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)
    registered: dict[str, Registration] = field(default_factory=dict)
    approvals: dict[str, list[Entry]] = field(default_factory=dict)
    pointed: dict[str, list[str]] = field(default_factory=dict)
    open: Entry | None = None
    moves: dict[str, str] = field(default_factory=dict)
    retired: set[str] = field(default_factory=set)
    undelivered: dict[str, list[tuple[Entry, Entry]]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> History:
        history = cls()
        for entry in entries:
            history._follow(entry)
        return history

    def _follow(self, entry: Entry) -> None:
        facts = entry.facts
        match entry.kind:
            case "begun":
                self.open, self.moves, self.retired = entry, {}, set()
            case "ended":
                self.open, self.moves, self.retired = None, {}, set()
            case "registered":
                self._register(entry, {facts["version"]: facts["digest"]})
            case "approved":
                self.approvals.setdefault(facts["version"], []).append(entry)
            case "revoked":
                given = self.approvals.get(facts["version"], [])
                given[:] = [one for one in given if one.actor != entry.actor]
            case "moved":
                self.moves = {alias: to for alias, (_, to) in facts["aliases"].items()}
                back = self.open is not None and self.open.facts["action"] == ROLLBACK
                self._point(self.moves, back=back)
                if self.open is not None:
                    for url in self.open.facts.get("webhooks", ()):
                        self.undelivered.setdefault(url, []).append((self.open, entry))
            case "retired":
                self.retired = set(facts["versions"])
                self.registered = {v: r for v, r in self.registered.items() if v not in self.retired}
                for held in self.held.values():
                    held[:] = [version for version in held if version not in self.retired]
            case "posted" if facts["delivered"]:
                waiting = self.undelivered.get(facts["url"], [])
                self.undelivered[facts["url"]] = [pair for pair in waiting if pair[1].digest != facts["entry"]]
            case "adopted":
                self.aliases = {}
                self._point(facts["aliases"])
                same = {v: r for v, r in self.registered.items() if facts["versions"].get(v) == r.digest}
                self._register(entry, facts["versions"])
                self.registered = {v: same.get(v, self.registered[v]) for v in facts["versions"]}

    def _register(self, entry: Entry, digests: Mapping[str, str]) -> None:
        self.registered |= {
            version: Registration(actor=entry.actor, at=entry.at, digest=digest) for version, digest in digests.items()
        }

    def _point(self, moves: Mapping[str, str], *, back: bool = False) -> None:
        for alias, version in moves.items():
            before = self.held.setdefault(alias, [])
            if back and version in before:
                bad = self.aliases.get(alias)
                before[:] = [v for v in before[: before.index(version)] if v != bad]
            before.append(version)
            self.pointed.setdefault(alias, []).append(version)
            self.aliases[alias] = version

    def approvers(self, version: str, digest: str) -> set[str]:
        """Who approved a version while its engine had this digest."""
        return {entry.actor for entry in self.approvals.get(version, ()) if entry.facts["digest"] == digest}

    def drift(self, actual: Mapping[str, str]) -> list[str]:
        """Every alias that does not point where the ledger says, one sentence each; `actual` is alias → version."""
        pairs = ((alias, actual.get(alias), self.aliases.get(alias)) for alias in sorted({*actual, *self.aliases}))
        return [
            f"alias {alias} points at {found or 'nothing'}, and the ledger says {held or 'nothing'}"
            for alias, found, held in pairs
            if found != held
        ]

    def before(self, alias: str) -> str | None:
        """The version that `alias` pointed at before the present one; None where there was none."""
        others = [version for version in self.held.get(alias, []) if version != self.aliases.get(alias)]
        return others[-1] if others else None


def told(kind: str, facts: Mapping[str, Any], reason: str) -> str:
    """An entry in one sentence, as people read it in the MLflow UI."""
    sentence = _SENTENCES[kind](facts)
    return f"{sentence}: {reason}" if reason else sentence


def _moves(facts: Mapping[str, Any]) -> str:
    moves = (f"{alias} from {old or 'nothing'} to {new}" for alias, (old, new) in facts["aliases"].items())
    return f"moved {', '.join(moves)}"


def _named(noun: str, names: Collection[str]) -> str:
    return f"{noun if len(names) == 1 else noun + 's'} {', '.join(names) or 'none'}"


_SENTENCES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "adopted": lambda f: f"took over {', '.join(f'{a} = {v}' for a, v in f['aliases'].items()) or 'no alias'}",
    "begun": lambda f: f"began {f['action']}",
    "judged": lambda f: f"judged {_named('trial', sorted(f['verdicts'], key=int))} by policy {f['policy']}",
    "registered": lambda f: f"registered version {f['version']}, engine {f['digest'][:12]}…",
    "approved": lambda f: f"approved version {f['version']}, engine {f['digest'][:12]}…",
    "revoked": lambda f: f"revoked the approval of version {f['version']}",
    "moved": _moves,
    "retired": lambda f: f"retired {_named('version', f['versions'])}",
    "posted": lambda f: f"told {redact_password(f['url'])}" if f["delivered"] else "could not tell a webhook",
    "ended": lambda f: f"ended {f['action']}, {f['outcome']}",
}
