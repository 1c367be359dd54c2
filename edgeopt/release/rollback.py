"""Point an alias back at an earlier version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.protocols import Progress
from edgeopt.errors import GateError, InputError
from edgeopt.release import signature
from edgeopt.release.ledger.history import ROLLBACK, History
from edgeopt.release.ledger.operation import Desk
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.webhook import Webhooks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """A rollback that was done.

    Attributes:
        before, after: version to which the alias pointed before and points now.
    """

    model: str
    alias: str
    before: str
    after: str


def rollback(
    reference: Reference,
    reason: str,
    *,
    to: str | None = None,
    public_key: Path | None = None,
    webhooks: Webhooks | None = None,
    tracking_uri: str | None = None,
    progress: Progress = lambda _: None,
) -> Rollback:
    """Point an alias at an earlier version, after fetching and verifying that version.

    Args:
        to: a version to which the alias pointed earlier. Default: the last one before the present version that was
            not rolled back itself.

    Raises:
        InputError: the reference names no alias, or the alias does not exist.
        GateError: there is no such earlier version, or it differs from what was registered.
    """
    if not reference.alias:
        raise InputError(
            f"a rollback needs an alias, got the version {reference.name}/{reference.version}",
            location="NAME@ALIAS",
            hint=f"Name an alias: {reference.name}@champion",
        )
    model, alias = reference.name, reference.alias
    with registry.answering(tracking_uri) as client:
        reference.find(client)
        desk = Desk(client, model, progress)
        hooks = webhooks or Webhooks()
        with desk.operation(ROLLBACK, reason, alias=alias, webhooks=list(hooks.urls)):
            present = desk.history.aliases[alias]
            target = _target(desk.history, model, alias, to)
            progress(f"verifying version {target}")
            version = Reference(name=model, version=target).find(client)
            engine = registry.fetch(version)
            if public_key is not None:
                signature.verify(engine, version.tags.get(signature.TAG, ""), public_key)
            desk.move({alias: target})
        hooks.deliver(desk)
    return Rollback(model=model, alias=alias, before=present, after=target)


def _target(history: History, model: str, alias: str, to: str | None) -> str:
    """Return the version to go back to; GateError if there is none."""
    present = history.aliases[alias]
    earlier = [v for v in dict.fromkeys(history.pointed.get(alias, ())) if v != present and v in history.registered]
    if to is None:
        before = history.before(alias)
        if before is not None:
            return before
        hint = f"Choose one: edgeopt rollback {model}@{alias} --to {earlier[-1]}" if earlier else "Promote another one"
        rolled_back = f"; rolled back since: {', '.join(earlier)}" if earlier else ""
        raise GateError(
            f"{alias} points at version {present}, and no earlier version is left{rolled_back}",
            location=model,
            hint=hint,
        )
    if to in earlier:
        return to
    raise GateError(
        f"`--to` must be a version to which {alias} pointed earlier, got {to!r}",
        location=model,
        hint=f"Choose one of: {', '.join(earlier)}" if earlier else f"{alias} never pointed at another version",
    )
