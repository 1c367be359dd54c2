"""Rollback: an alias goes back to the version that it pointed at before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.protocols import Progress
from edgeopt.errors import GateError, InputError
from edgeopt.release import signature
from edgeopt.release.ledger.history import ROLLBACK
from edgeopt.release.ledger.operation import Desk
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.webhook import Webhooks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    model: str
    alias: str
    before: str
    after: str


def rollback(
    reference: Reference,
    reason: str,
    *,
    public_key: Path | None = None,
    webhooks: Webhooks | None = None,
    tracking_uri: str | None = None,
    progress: Progress = lambda _: None,
) -> Rollback:
    """Let the alias point at the last version before the present one that was not rolled back itself.

    That version is fetched and verified first. Raises GateError where there is none, or where it is not what was
    registered.
    """
    if not reference.alias:
        raise InputError("a version cannot be rolled back", location="uri", hint="Name an alias: NAME@champion")
    model, alias = reference.name, reference.alias
    with registry.answering(tracking_uri) as client:
        reference.find(client)
        desk = Desk(client, model, progress)
        told = webhooks or Webhooks()
        with desk.operation(ROLLBACK, reason, alias=alias, webhooks=list(told.urls)):
            present, before = desk.history.aliases[alias], desk.history.before(alias)
            if before is None:
                raise GateError(
                    f"{alias} never pointed at another version than {present}",
                    location=model,
                    hint="Promote another one",
                )
            progress(f"verifying version {before}")
            version = Reference(name=model, version=before).find(client)
            engine = registry.fetch(version)
            if public_key is not None:
                signature.verify(engine, version.tags.get(signature.TAG, ""), public_key)
            desk.move({alias: before})
        told.deliver(desk)
    return Rollback(model=model, alias=alias, before=present, after=before)
