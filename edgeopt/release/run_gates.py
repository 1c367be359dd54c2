"""Run the built-in gates and the gates of a policy on every trial of a front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeopt.core.study_snapshot import LimitSnapshot, TrialSnapshot
from edgeopt.release import signature
from edgeopt.release.candidate import (
    Candidate,
    Gate,
    GateVerdict,
    RecordedTrial,
    Remeasure,
    load_candidate,
    read_trial,
)
from edgeopt.release.gates.engine import EngineIntact
from edgeopt.release.gates.limits import LimitsKept
from edgeopt.release.gates.metrics import RankingMetrics
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.release.policy import Policy
from edgeopt.release.ranking import first
from edgeopt.release.registry import client as registry

BUILT_IN_GATES: tuple[Gate, ...] = (EngineIntact(), LimitsKept())
"""Gates that run before those of every policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResults:
    """A candidate with the verdict of every gate."""

    candidate: Candidate
    verdicts: tuple[GateVerdict, ...]

    @property
    def number(self) -> int:
        """Return the number of the candidate's trial."""
        return self.candidate.snapshot.number

    @property
    def refusals(self) -> list[str]:
        """Return one sentence for each refusal, with trial and gate."""
        return [
            f"trial {self.number}, {verdict.gate}: {verdict.evidence}"
            for verdict in dict.fromkeys(self.verdicts)
            if not verdict.passed
        ]


def run_gates(
    operation: ReleaseOperation,
    policy: Policy,
    front: Sequence[TrialSnapshot],
    limits: tuple[LimitSnapshot, ...],
    scratch: Path,
    *,
    private_key: Path | None,
    remeasure: Remeasure | None,
) -> list[GateResults]:
    """Check every trial of the front; engines that are not on this machine are downloaded to `scratch`."""
    alias_trials, champion = _choose_alias_trials(policy, front), _read_champion(operation, policy)
    ranking_metrics = sorted({criterion.metric for criteria in policy.aliases.values() for criterion in criteria})
    gates = (*BUILT_IN_GATES, RankingMetrics(metrics=tuple(ranking_metrics)), *policy.gates)
    results = []
    for trial in front:
        operation.progress(f"checking trial {trial.number}")
        loaded = load_candidate(operation.client, trial, limits, scratch)
        candidate = replace(
            loaded,
            aliases=tuple(alias for alias, number in alias_trials.items() if number == trial.number),
            champion=champion if champion is not None and champion.run_id != loaded.run_id else None,
            remeasure=remeasure,
        )
        verdicts = (*(gate.check(candidate) for gate in gates), _check_key(policy, private_key))
        results.append(GateResults(candidate=candidate, verdicts=verdicts))
    return results


def _choose_alias_trials(policy: Policy, front: Sequence[TrialSnapshot]) -> dict[str, int]:
    """Return alias to trial number; empty if a trial lacks a metric of the ranking, which its gate refuses."""
    metrics = {criterion.metric for criteria in policy.aliases.values() for criterion in criteria}
    if any(trial.metrics.get(metric) is None for trial in front for metric in metrics):
        return {}
    return {alias: first(front, criteria) for alias, criteria in policy.aliases.items()}


def _read_champion(operation: ReleaseOperation, policy: Policy) -> RecordedTrial | None:
    version = registry.aliases(operation.client, policy.model).get("champion")
    if version is None:
        return None
    run_id = operation.client.get_model_version(policy.model, version).run_id or ""
    return read_trial(operation.client, operation.client.get_run(run_id))


def _check_key(policy: Policy, private_key: Path | None) -> GateVerdict:
    if private_key is None and policy.public_key is not None:
        evidence = f"the policy requires a signature, but there is no private key: use --key, or set {signature.KEY}"
        return GateVerdict(gate="signature", passed=False, evidence=evidence)
    return GateVerdict(gate="signature", passed=True, evidence="will be signed" if private_key else "not required")
