"""Verification of one version: its bytes, its signature, and what the ledger says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeopt.core.artifact import Engine
from edgeopt.errors import EdgeoptError, GateError
from edgeopt.release import signature
from edgeopt.release.audit import audit
from edgeopt.release.candidate import GateVerdict
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Attributes:
    engine: as it was fetched; None where there is none that is whole.
    """

    model: str
    version: str
    engine: Engine | None
    checks: tuple[GateVerdict, ...]

    @property
    def digest(self) -> str:
        """That of the engine; empty where there is none."""
        return "" if self.engine is None else self.engine.digest

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"model": self.model, "version": self.version, "digest": self.digest, "checks": checks}

    def require(self) -> Engine:
        """The engine. GateError that names every check which failed."""
        failed = [f"{check.gate}: {check.evidence}" for check in self.checks if not check.passed]
        if failed or self.engine is None:
            raise GateError(
                "; ".join(failed),
                location=f"{self.model}/{self.version}",
                hint="Do not use it, and find out who changed it",
            )
        return self.engine


def verify(
    reference: Reference,
    *,
    public_key: Path | None = None,
    destination: Path | None = None,
    tracking_uri: str | None = None,
) -> Verification:
    """Look at everything that can be checked of a version. Raises InputError where it does not exist.

    Args:
        destination: folder that takes a download; without it a temporary one, or none where the store is local.
    """
    with registry.answering(tracking_uri) as client:
        version = reference.find(client)
        found = audit(reference.name, tracking_uri=tracking_uri)
        held = "; ".join(found.faults) or f"{len(found.entries)} entries, their chain holds, all aliases where it says"
        checks = [GateVerdict(gate="ledger", passed=not found.faults, evidence=held)]
        engine = None
        try:
            engine = registry.fetch(version, destination)
        except EdgeoptError as error:
            checks.append(GateVerdict(gate="bytes", passed=False, evidence=str(error)))
        else:
            evidence = f"{len(engine.files)} files and the manifest, {engine.size_bytes} bytes"
            checks.append(GateVerdict(gate="bytes", passed=True, evidence=evidence))
            checks.append(_signature(engine, version.tags.get(signature.TAG, ""), public_key))
    return Verification(model=reference.name, version=str(version.version), engine=engine, checks=tuple(checks))


def _signature(engine: Engine, signed: str, public_key: Path | None) -> GateVerdict:
    if public_key is None:
        evidence = "there is one, and no key to check it with" if signed else "there is none, and none is asked for"
        return GateVerdict(gate="signature", passed=True, evidence=evidence)
    if not signed:
        return GateVerdict(gate="signature", passed=False, evidence="the version is not signed")
    try:
        signature.verify(engine, signed, public_key)
    except GateError as error:
        return GateVerdict(gate="signature", passed=False, evidence=str(error))
    return GateVerdict(gate="signature", passed=True, evidence=f"by the key {public_key.name}")
