"""The gate that looks at the engine's bytes."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core import mlflow_tags as tags
from edgeopt.errors import EdgeoptError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIntact:
    """The logged model really holds the engine, whole and with the digest that was measured."""

    def check(self, candidate: Candidate) -> GateVerdict:
        expected = candidate.run_tags.get(tags.ENGINE_DIGEST, "")
        try:
            engine = candidate.engine()
        except EdgeoptError as error:
            return GateVerdict(gate="engine", passed=False, evidence=str(error))
        if engine.digest != expected:
            evidence = f"the engine's digest is {engine.digest[:12]}…, measured was {expected[:12] or 'none'}…"
            return GateVerdict(gate="engine", passed=False, evidence=evidence)
        if engine.manifest_sha256 != candidate.run_tags.get(tags.MANIFEST_SHA256):
            return GateVerdict(gate="engine", passed=False, evidence="the manifest is not the one that was measured")
        return GateVerdict(gate="engine", passed=True, evidence=f"{len(engine.files)} files, digest {engine.digest}")
