"""The gate that looks for slow paths in the engine."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core import config_objects
from edgeopt.errors import EdgeoptError
from edgeopt.release.candidate import Candidate, GateVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LintClean:
    """The engine takes none of the slow paths that its runtime knows of."""

    def check(self, candidate: Candidate) -> GateVerdict:
        try:
            engine = candidate.engine()
            runtime = config_objects.instantiate(engine.made_by["runtime"], location="made_by.runtime")
            found = runtime.lint(engine)
        except (EdgeoptError, KeyError) as error:
            return GateVerdict(gate="lint", passed=False, evidence=f"it cannot be linted: {error}")
        return GateVerdict(gate="lint", passed=not found, evidence="; ".join(found) or "no slow path")
