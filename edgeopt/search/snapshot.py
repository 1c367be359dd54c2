"""Take a snapshot of a study from its trial storage."""

from __future__ import annotations

from collections.abc import Mapping

from edgeopt.core.study_snapshot import LimitSnapshot, ObjectiveSnapshot, StudySnapshot, TrialSnapshot
from edgeopt.search.pareto.ranking import bounds
from edgeopt.search.storage.summary import Summary
from edgeopt.search.storage.trial import Row
from edgeopt.search.study import Study


def snapshot(study: Study, units: Mapping[str, str]) -> StudySnapshot:
    """Return the study as it is now.

    Args:
        units: unit of each metric.
    """
    rows, ranks = study.rows(), study.ranks()
    known = bounds(rows)
    return StudySnapshot(
        study=study.name,
        objectives=tuple(
            ObjectiveSnapshot(metric=o.metric, unit=units.get(o.metric, ""), direction=o.direction)
            for o in study.objectives
        ),
        limits=tuple(
            LimitSnapshot(metric=x.metric, text=str(x), bound=known.get(x.metric, x.absolute), unit=x.unit)
            for x in study.limits
        ),
        trials=tuple(trial_snapshot(row, ranks.get(row.number)) for row in rows),
    )


def trial_snapshot(row: Row, rank: int | None) -> TrialSnapshot:
    """Return one trial with its Pareto rank."""
    summary = row.summary or Summary()
    return TrialSnapshot(
        number=row.number,
        state=row.state,
        feasible=summary.feasible,
        pareto_rank=rank,
        origin=row.origin,
        params=dict(row.params),
        metrics=dict(summary.metrics),
        intervals=dict(summary.intervals),
        baseline=dict(summary.baseline),
        predicted=dict(summary.predicted),
        excess={metric: held.excess for metric, held in summary.verdicts.items()},
        rung=summary.refused,
        run_id=row.run_id or None,
        failure=summary.failure,
    )
