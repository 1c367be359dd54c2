"""Approval of a version by a person, bound to the bytes of its engine."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.protocols import Progress
from edgeopt.errors import GateError
from edgeopt.release.ledger.actor import actor
from edgeopt.release.ledger.operation import Desk
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    model: str
    version: str
    digest: str
    actor: str


def approve(
    reference: Reference, reason: str, *, tracking_uri: str | None = None, progress: Progress = lambda _: None
) -> Approval:
    """Enter into the ledger that this user approves a version.

    Raises GateError where this user registered it, or where it is not what was registered.
    """
    with registry.answering(tracking_uri) as client:
        version = reference.find(client)
        number, digest = str(version.version), version.tags.get(tags.ENGINE_DIGEST, "")
        desk = Desk(client, reference.name, progress)
        known = desk.settle().registered.get(number)
        name = f"{reference.name}/{number}"
        if known is None or known.digest != digest:
            raise GateError(
                f"version {name} is not what the ledger says that was registered",
                location="approve",
                hint=f"Find out who changed it: `edgeopt audit {reference.name}`",
            )
        if known.actor == actor():
            raise GateError(
                f"{known.actor} registered version {name}, so somebody else has to approve it", location="approve"
            )
        desk.note("approved", reason, version=number, digest=digest)
    return Approval(model=reference.name, version=number, digest=digest, actor=actor())
