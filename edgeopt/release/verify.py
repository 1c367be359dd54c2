"""Verify one registered version or a copy of it: its files, its signature, and the model's ledger."""

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
    """Result of a verification.

    Attributes:
        engine: the fetched engine; None if it is missing or damaged.
    """

    model: str
    version: str
    engine: Engine | None
    checks: tuple[GateVerdict, ...]

    @property
    def digest(self) -> str:
        """Return the digest of the engine; empty if there is none."""
        return "" if self.engine is None else self.engine.digest

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
        checks = [asdict(check) for check in self.checks]
        return {"model": self.model, "version": self.version, "digest": self.digest, "checks": checks}

    def require(self) -> Engine:
        """Return the engine. Raises GateError with every failed check."""
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
    folder: Path | None = None,
    tracking_uri: str | None = None,
) -> Verification:
    """Run every check on a version. Raises InputError if the version does not exist.

    Args:
        public_key: key that must have signed the version. Default: the signature is not checked.
        destination: folder for a download. Default: a temporary folder, or no download from a local store.
        folder: check the engine in this folder, which `edgeopt pull` wrote, instead of the registry's files.
    """
    with registry.connect(tracking_uri) as client:
        version = reference.find(client)
        checks = [_check_ledger(reference.name, tracking_uri)]
        engine = None
        try:
            if folder is None:
                engine = registry.fetch_engine(version, destination)
            else:
                pulled = Engine.read(folder)
                registry.require_registered(pulled, version)
                engine = pulled
        except EdgeoptError as error:
            checks.append(GateVerdict(gate="bytes", passed=False, evidence=str(error)))
        else:
            evidence = f"{len(engine.files)} files and the manifest, {engine.size_bytes} bytes"
            checks.append(GateVerdict(gate="bytes", passed=True, evidence=evidence))
            checks.append(_check_signature(engine, version.tags.get(signature.TAG, ""), public_key))
    return Verification(model=reference.name, version=str(version.version), engine=engine, checks=tuple(checks))


def _check_ledger(model: str, tracking_uri: str | None) -> GateVerdict:
    result = audit(model, tracking_uri=tracking_uri)
    evidence = "; ".join(result.problems) or f"{len(result.entries)} entries, intact, and the registry agrees with them"
    return GateVerdict(gate="ledger", passed=not result.problems, evidence=evidence)


def _check_signature(engine: Engine, version_signature: str, public_key: Path | None) -> GateVerdict:
    if public_key is None:
        evidence = "not checked: give --public-key" if version_signature else "not signed, and no key was given"
        return GateVerdict(gate="signature", passed=True, evidence=evidence)
    if not version_signature:
        return GateVerdict(gate="signature", passed=False, evidence="the version is not signed")
    try:
        signature.verify(engine, version_signature, public_key)
    except GateError as error:
        return GateVerdict(gate="signature", passed=False, evidence=str(error))
    return GateVerdict(gate="signature", passed=True, evidence=f"made with the key {public_key.name}")
