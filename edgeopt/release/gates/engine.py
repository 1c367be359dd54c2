"""Verify the files of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core import mlflow_tags as tags
from edgeopt.errors import EdgeoptError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIntact:
    """Require that the logged model contains the complete engine that was measured."""

    def check(self, candidate: Candidate) -> GateVerdict:
        """Verify every file, and compare digest and manifest with the tags of the run."""
        measured_digest = candidate.run_tags.get(tags.ENGINE_DIGEST, "")
        try:
            engine = candidate.engine()
        except EdgeoptError as error:
            return GateVerdict(gate="engine", passed=False, evidence=str(error))
        if engine.digest != measured_digest:
            measured = f"{measured_digest[:12]}…" if measured_digest else "none"
            evidence = f"the engine's digest is {engine.digest[:12]}…, but the measured engine's was {measured}"
            return GateVerdict(gate="engine", passed=False, evidence=evidence)
        if engine.manifest_sha256 != candidate.run_tags.get(tags.MANIFEST_SHA256):
            evidence = "the manifest differs from the manifest of the measured engine"
            return GateVerdict(gate="engine", passed=False, evidence=evidence)
        return GateVerdict(gate="engine", passed=True, evidence=f"{len(engine.files)} files, digest {engine.digest}")
