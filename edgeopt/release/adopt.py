"""Accept the present state of a registered model into its ledger."""

from __future__ import annotations

from edgeopt.core.protocols import Progress
from edgeopt.release.audit import Audit, audit
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.release.registry import client as registry


def adopt(model: str, reason: str, *, tracking_uri: str | None = None, progress: Progress = lambda _: None) -> Audit:
    """Record the present aliases and versions as valid and return an audit.

    Raises GateError if the ledger was manipulated.
    """
    with registry.connect(tracking_uri) as client:
        ReleaseOperation(client, model, progress).adopt(reason)
    return audit(model, tracking_uri=tracking_uri)
