"""Define what a ledger entry can record: one class for each kind of event.

An event is stored as JSON text in its entry. `parse` is the only place that reads this JSON.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from edgeopt.core.redaction import redact_password

GateRecord = tuple[str, bool, str]
"""Name of a gate, True if it passed, and its evidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(ABC):
    """Base class of the events. `KIND` is the name of the event in the ledger."""

    KIND: ClassVar[str]

    @abstractmethod
    def describe(self) -> str:
        """Return the event as a sentence without a subject, for the MLflow UI and `edgeopt releases`."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields in plain JSON types."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the event with these fields. Raises TypeError if a field is missing."""
        return cls(**_known_fields(cls, data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted(Event):
    """Aliases and versions that existed before the ledger, or that a user accepted with `edgeopt audit --adopt`.

    Attributes:
        aliases: alias to version.
        versions: version to the digest of its engine.
    """

    KIND = "adopted"
    aliases: Mapping[str, str]
    versions: Mapping[str, str]

    def describe(self) -> str:
        return f"adopted {', '.join(f'{alias} = {v}' for alias, v in self.aliases.items()) or 'no alias'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Process that runs an operation.

    Attributes:
        host: id of the machine.
        machine: name of the machine, for people.
        process: identity of the process on that machine.
    """

    host: str
    machine: str
    process: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun(Event):
    """Start of an operation. The next operation starts after this one has ended.

    Attributes:
        webhooks: URLs to notify of moved aliases.
        study, policy: study and release policy of a promotion.
        alias: alias of a rollback.
        origin: version that a copy was made from, with its registry.
        evidence: entries of the origin's ledger about the copied version.
    """

    KIND = "begun"
    action: str
    holder: Holder
    webhooks: tuple[str, ...] = ()
    study: str = ""
    policy: str = ""
    alias: str = ""
    origin: str = ""
    evidence: tuple[Mapping[str, Any], ...] = ()

    def describe(self) -> str:
        return f"began {self.action}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not empty in plain JSON types."""
        return {name: value for name, value in Event.to_json(self).items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the event with these fields. Raises TypeError if a field is missing."""
        return cls(**_known_fields(cls, data) | {"holder": Holder(**data["holder"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Event):
    """Verdicts of the gates on the candidates.

    Attributes:
        verdicts: number of a trial to its verdicts.
    """

    KIND = "judged"
    policy: str
    verdicts: Mapping[str, tuple[GateRecord, ...]]

    def describe(self) -> str:
        return f"checked {_list('trial', sorted(self.verdicts, key=int))} by policy {self.policy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(Event):
    """Registration of a version.

    Attributes:
        digest: digest of the version's engine.
        trial: study and number of the trial, as `STUDY/NUMBER`.
    """

    KIND = "registered"
    version: str
    digest: str
    run_id: str = ""
    trial: str = ""

    def describe(self) -> str:
        return f"registered version {self.version}, engine {self.digest[:12]}…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Approved(Event):
    """Approval of a version by a person, bound to the digest of its engine."""

    KIND = "approved"
    version: str
    digest: str

    def describe(self) -> str:
        return f"approved version {self.version}, engine {self.digest[:12]}…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked(Event):
    """Withdrawal of an approval by the person who gave it."""

    KIND = "revoked"
    version: str
    digest: str

    def describe(self) -> str:
        return f"revoked the approval of version {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired(Event):
    """Versions that the policy no longer keeps. The entry is written before they are removed."""

    KIND = "retired"
    versions: tuple[str, ...]

    def describe(self) -> str:
        return f"retired {_list('version', self.versions)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved(Event):
    """Moves of aliases. The entry is written before they are set.

    Attributes:
        aliases: alias to its version before, None for a new alias, and after the move.
    """

    KIND = "moved"
    aliases: Mapping[str, tuple[str | None, str]]

    def describe(self) -> str:
        moves = (f"{alias} from {old or 'nothing'} to {new}" for alias, (old, new) in self.aliases.items())
        return f"moved {', '.join(moves)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted(Event):
    """Message about a move to a webhook.

    Attributes:
        entry: digest of the `moved` entry.
        delivered: True if the receiver accepted the message.
    """

    KIND = "posted"
    entry: str
    url: str
    delivered: bool

    def describe(self) -> str:
        return f"notified {redact_password(self.url)}" if self.delivered else "failed to notify a webhook"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """End of an operation.

    Attributes:
        outcome: done, refused, waiting for approval or failed; completed or undone if another process ended the
            operation of a dead one.
    """

    KIND = "ended"
    action: str
    outcome: str

    def describe(self) -> str:
        return f"ended {self.action}, {self.outcome}"


_CLASSES: Mapping[str, type[Event]] = {
    cls.KIND: cls for cls in (Adopted, Begun, Judged, Registered, Approved, Revoked, Retired, Moved, Posted, Ended)
}


def parse(kind: str, data: Mapping[str, Any]) -> Event:
    """Return the event in the JSON fields of an entry. Raises ValueError for an unknown kind or a missing field."""
    if kind not in _CLASSES:
        raise ValueError(f"the kind must be one of {', '.join(_CLASSES)}, got {kind!r}")
    try:
        return _CLASSES[kind].from_json(data)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"invalid fields of a {kind} entry ({error})") from error


def describe(event: Event, reason: str) -> str:
    """Return the event as one sentence with its reason."""
    return f"{event.describe()}: {reason}" if reason else event.describe()


def _known_fields(cls: type[Event], data: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def _list(noun: str, names: Collection[str]) -> str:
    return f"{noun if len(names) == 1 else noun + 's'} {', '.join(names) or 'none'}"
