"""Adoption: the registry as it is, whoever made it so, becomes what the ledger says."""

from __future__ import annotations

from edgeopt.core.protocols import Progress
from edgeopt.release.audit import Audit, audit
from edgeopt.release.ledger.operation import Desk
from edgeopt.release.registry import client as registry


def adopt(model: str, reason: str, *, tracking_uri: str | None = None, progress: Progress = lambda _: None) -> Audit:
    """Enter aliases and versions as they are. GateError where the ledger itself does not hold."""
    with registry.answering(tracking_uri) as client:
        Desk(client, model, progress).adopt(reason)
    return audit(model, tracking_uri=tracking_uri)
