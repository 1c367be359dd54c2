"""Take a snapshot of a study from its trial storage."""

from __future__ import annotations

from collections.abc import Mapping

from edgeopt.core.study_snapshot import LimitSnapshot, ObjectiveSnapshot, StudySnapshot, TrialSnapshot
from edgeopt.search.pareto.ranking import limit_bounds
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.study import Study


def take_snapshot(study: Study, units: Mapping[str, str]) -> StudySnapshot:
    """Return the study as it is now.

    Args:
        units: unit of each metric.
    """
    trials, ranks = study.trials(), study.ranks()
    bounds = limit_bounds(trials)
    return StudySnapshot(
        study=study.name,
        objectives=tuple(
            ObjectiveSnapshot(metric=o.metric, unit=units.get(o.metric, ""), direction=o.direction)
            for o in study.objectives
        ),
        limits=tuple(
            LimitSnapshot(metric=x.metric, text=str(x), bound=bounds.get(x.metric, x.absolute), unit=x.unit)
            for x in study.limits
        ),
        trials=tuple(snapshot_trial(trial, ranks.get(trial.number)) for trial in trials),
    )


def snapshot_trial(trial: Trial, rank: int | None) -> TrialSnapshot:
    """Return one trial with its Pareto rank."""
    summary = trial.summary or TrialSummary()
    return TrialSnapshot(
        number=trial.number,
        state=trial.state,
        feasible=summary.feasible,
        pareto_rank=rank,
        origin=trial.origin,
        params=dict(trial.params),
        metrics=dict(summary.metrics),
        intervals=dict(summary.intervals),
        baseline=dict(summary.baseline),
        predicted=dict(summary.predicted),
        excess={metric: verdict.excess for metric, verdict in summary.verdicts.items()},
        disturbed=tuple(
            metric
            for metric, verdict in summary.verdicts.items()
            if not verdict.satisfied and verdict.excess is not None and verdict.excess <= 0
        ),
        rung=summary.refused,
        run_id=trial.run_id or None,
        failure=summary.failure,
    )
