"""Approve a version, or revoke an approval. An approval is bound to the digest of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.protocols import Progress
from edgeopt.errors import GateError
from edgeopt.release.ledger.actor import actor
from edgeopt.release.ledger.events import Approved, Revoked
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """An approval that was given or revoked.

    Attributes:
        changed: False if the ledger already contained the approval.
    """

    model: str
    version: str
    digest: str
    actor: str
    changed: bool = True


def approve(
    reference: Reference, reason: str, *, tracking_uri: str | None = None, progress: Progress = lambda _: None
) -> Approval:
    """Record this user's approval of a version. A second approval by the same user changes nothing.

    Raises GateError if this user registered the version, or if the version differs from what was registered.
    """
    with registry.connect(tracking_uri) as client:
        version = reference.find(client)
        number, digest = str(version.version), version.tags.get(tags.ENGINE_DIGEST, "")
        operation = ReleaseOperation(client, reference.name, progress)
        history = operation.recover()
        registration = history.registrations.get(number)
        name = f"{reference.name}/{number}"
        if registration is None or registration.digest != digest:
            raise GateError(
                f"version {name} differs from what the ledger says was registered",
                location="approve",
                hint=f"Find out who changed it: `edgeopt audit {reference.name}`",
            )
        if registration.actor == actor():
            raise GateError(
                f"{registration.actor} registered version {name}, so another user must approve it",
                location="approve",
            )
        approved_before = actor() in history.approvers(number, digest)
        if not approved_before:
            operation.append(Approved(version=number, digest=digest), reason)
    return Approval(model=reference.name, version=number, digest=digest, actor=actor(), changed=not approved_before)


def revoke(
    reference: Reference, reason: str, *, tracking_uri: str | None = None, progress: Progress = lambda _: None
) -> Approval:
    """Record that this user withdraws an approval. Aliases that already moved do not move back.

    Raises GateError if this user has not approved the version.
    """
    with registry.connect(tracking_uri) as client:
        version = reference.find(client)
        number, digest = str(version.version), version.tags.get(tags.ENGINE_DIGEST, "")
        operation = ReleaseOperation(client, reference.name, progress)
        if actor() not in operation.recover().approvers(number, digest):
            raise GateError(
                f"{actor()} has not approved version {reference.name}/{number}",
                location="approve",
                hint="Only the person who approved a version can revoke the approval",
            )
        operation.append(Revoked(version=number, digest=digest), reason)
    return Approval(model=reference.name, version=number, digest=digest, actor=actor())
