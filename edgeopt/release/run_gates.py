"""Judging: every member of a front before every gate of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeopt.core.study_snapshot import LimitSnapshot, TrialSnapshot
from edgeopt.release import signature
from edgeopt.release.candidate import Candidate, Gate, GateVerdict, Remeasure, Trial, candidate, trial_of
from edgeopt.release.gates.engine import EngineIntact
from edgeopt.release.gates.limits import LimitsKept
from edgeopt.release.gates.metrics import RequiredMetrics
from edgeopt.release.ledger.operation import Desk
from edgeopt.release.policy import Policy
from edgeopt.release.ranking import first
from edgeopt.release.registry import client as registry

ALWAYS: tuple[Gate, ...] = (EngineIntact(), LimitsKept())
"""No policy can leave these out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A candidate with what every gate said of it."""

    candidate: Candidate
    verdicts: tuple[GateVerdict, ...]

    @property
    def number(self) -> int:
        """Of its trial."""
        return self.candidate.snapshot.number

    @property
    def refusals(self) -> list[str]:
        """Every refusal, with the trial and the gate."""
        return [
            f"trial {self.number}, {verdict.gate}: {verdict.evidence}"
            for verdict in dict.fromkeys(self.verdicts)
            if not verdict.passed
        ]


def judge(
    desk: Desk,
    policy: Policy,
    front: Sequence[TrialSnapshot],
    limits: tuple[LimitSnapshot, ...],
    scratch: Path,
    *,
    private_key: Path | None,
    remeasure: Remeasure | None,
) -> list[Judged]:
    """Every member of the front; `scratch` takes engines that do not lie on this machine."""
    wanted, champion = _wanted(policy, front), _champion(desk, policy)
    ranked = sorted({criterion.metric for criteria in policy.aliases.values() for criterion in criteria})
    gates = (*ALWAYS, RequiredMetrics(metrics=tuple(ranked), estimated=True), *policy.gates)
    judged = []
    for trial in front:
        desk.progress(f"checking trial {trial.number}")
        bare = candidate(desk.client, trial, limits, scratch)
        seen = replace(
            bare,
            aliases=tuple(alias for alias, number in wanted.items() if number == trial.number),
            champion=champion if champion is not None and champion.run_id != bare.run_id else None,
            remeasure=remeasure,
        )
        verdicts = (*(gate.check(seen) for gate in gates), _signable(policy, private_key))
        judged.append(Judged(candidate=seen, verdicts=verdicts))
    return judged


def _wanted(policy: Policy, front: Sequence[TrialSnapshot]) -> dict[str, int]:
    """Alias → number of the trial that it would point at; nothing where a metric is missing, which is refused."""
    metrics = {criterion.metric for criteria in policy.aliases.values() for criterion in criteria}
    if any(trial.metrics.get(metric) is None for trial in front for metric in metrics):
        return {}
    return {alias: first(front, criteria) for alias, criteria in policy.aliases.items()}


def _champion(desk: Desk, policy: Policy) -> Trial | None:
    version = registry.aliases(desk.client, policy.model).get("champion")
    if version is None:
        return None
    run_id = desk.client.get_model_version(policy.model, version).run_id or ""
    return trial_of(desk.client, desk.client.get_run(run_id))


def _signable(policy: Policy, private_key: Path | None) -> GateVerdict:
    if private_key is None and policy.public_key is not None:
        evidence = f"the policy wants a signature, and no key is given: use --key, or set {signature.KEY}"
        return GateVerdict(gate="signature", passed=False, evidence=evidence)
    return GateVerdict(gate="signature", passed=True, evidence="will be signed" if private_key else "not asked for")
