"""Point an alias back at an earlier version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.protocols import Progress
from edgeopt.errors import GateError, InputError
from edgeopt.release import signature
from edgeopt.release.ledger.history import ROLLBACK, History
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.webhook import Webhooks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Result of a rollback.

    Attributes:
        before, after: version of the alias before and after the rollback.
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
    with registry.connect(tracking_uri) as client:
        reference.find(client)
        operation = ReleaseOperation(client, model, progress)
        hooks = webhooks or Webhooks()
        with operation.run(ROLLBACK, reason, alias=alias, webhooks=hooks.urls):
            present = operation.history.aliases[alias]
            target = _target(operation.history, model, alias, to)
            progress(f"verifying version {target}")
            version = Reference(name=model, version=target).find(client)
            engine = registry.fetch_engine(version)
            if public_key is not None:
                signature.verify(engine, version.tags.get(signature.TAG, ""), public_key)
            operation.move({alias: target})
        hooks.deliver(operation)
    return Rollback(model=model, alias=alias, before=present, after=target)


def _target(history: History, model: str, alias: str, to: str | None) -> str:
    """Return the version to which the rollback goes. Raises GateError if there is none."""
    present = history.aliases[alias]
    earlier = [
        v for v in dict.fromkeys(history.past_versions.get(alias, ())) if v != present and v in history.registrations
    ]
    if to is None:
        previous = history.previous_version(alias)
        if previous is not None:
            return previous
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
