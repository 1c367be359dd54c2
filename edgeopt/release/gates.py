"""Gates: each looks at one candidate and says with its evidence whether it may be released.

A gate is a part with a `check`; a policy names further ones by `_target_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeopt import tags
from edgeopt.artifact import Engine
from edgeopt.errors import ConfigError, EdgeoptError
from edgeopt.release import registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A member of the front, as a gate sees it.

    Attributes:
        row, limits: as `edgeopt front --json` gives them.
        run_tags: tags of the trial's MLflow run.
        model_id: the logged model that would be registered; empty where the run has none that is complete.
        folder: that model, downloaded; None where it could not be, for the reason in `missing`.
    """

    row: Mapping[str, Any]
    limits: Sequence[Mapping[str, Any]]
    run_tags: Mapping[str, str]
    run_id: str
    model_id: str
    folder: Path | None
    missing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    gate: str
    passed: bool
    evidence: str


class Gate(Protocol):
    def check(self, candidate: Candidate) -> GateVerdict: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsKept:
    """The trial is feasible, and every limit of the study was measured in it and kept."""

    def check(self, candidate: Candidate) -> GateVerdict:
        row, faults = candidate.row, []
        if not row["feasible"]:
            faults.append("the trial is not feasible")
        for limit in candidate.limits:
            metric, excess = limit["metric"], row["excess"].get(limit["metric"])
            if row["metrics"].get(metric) is None or excess is None:
                faults.append(f"{metric} was not measured")
            elif excess > 0:
                faults.append(f"{metric} is {excess:.1%} beyond its limit ({limit['limit']})")
        return GateVerdict(
            gate="limits",
            passed=not faults,
            evidence="; ".join(faults) or f"{len(candidate.limits)} limits measured and kept",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIntact:
    """The logged model really holds the engine, whole and with the digest that was measured."""

    def check(self, candidate: Candidate) -> GateVerdict:
        if candidate.folder is None:
            return GateVerdict(gate="engine", passed=False, evidence=candidate.missing)
        expected = candidate.run_tags.get(tags.ENGINE_DIGEST, "")
        try:
            engine = Engine.read(registry.engine_folder(candidate.folder))
            engine.verify()
        except EdgeoptError as error:
            return GateVerdict(gate="engine", passed=False, evidence=str(error))
        if engine.digest != expected:
            evidence = f"the engine's digest is {engine.digest[:12]}…, measured was {expected[:12] or 'none'}…"
            return GateVerdict(gate="engine", passed=False, evidence=evidence)
        return GateVerdict(gate="engine", passed=True, evidence=f"{len(engine.files)} files, digest {engine.digest}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredMetrics:
    """Every one of `metrics` was measured."""

    metrics: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError("no metric is named", place="metrics", mend="Name one, or leave the gate out")

    def check(self, candidate: Candidate) -> GateVerdict:
        absent = [metric for metric in self.metrics if candidate.row["metrics"].get(metric) is None]
        evidence = f"not measured: {', '.join(absent)}" if absent else f"{len(self.metrics)} metrics measured"
        return GateVerdict(gate="metrics", passed=not absent, evidence=evidence)


ALWAYS: tuple[Gate, ...] = (LimitsKept(), EngineIntact())
"""No policy can leave these out."""
