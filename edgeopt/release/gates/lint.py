"""Check the engine for known slow paths."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core import config_objects
from edgeopt.errors import EdgeoptError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LintClean:
    """Require that the engine uses none of the slow paths that its runtime knows."""

    def check(self, candidate: Candidate) -> GateVerdict:
        """Lint the engine with the runtime in its manifest."""
        try:
            engine = candidate.engine()
            runtime = config_objects.instantiate(engine.runtime_config, location="made_by.runtime")
            findings = runtime.lint(engine)
        except EdgeoptError as error:
            return GateVerdict(gate="lint", passed=False, evidence=f"the engine cannot be linted: {error}")
        return GateVerdict(gate="lint", passed=not findings, evidence="; ".join(findings) or "no slow path")
