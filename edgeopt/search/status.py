"""Summarize the progress of a study: workers, trials, time spent and saved, and growth of the front."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core.study_snapshot import OUTCOMES
from edgeopt.search.pareto.ranking import total_spent_j, total_spent_s
from edgeopt.search.snapshot import snapshot_trial
from edgeopt.search.storage.trial import ENDED_STATES, EVALUATED_STATES, Trial
from edgeopt.search.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker and the number of the trial that it evaluates; None while it waits for one."""

    worker: str
    role: str
    trial: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """Progress of a study. Seconds and joules are totals over all trials and workers.

    Attributes:
        stop_reason: why the search ended; empty while it continues.
        trials: number of trials by state.
        outcomes: number of trials by outcome, in the words of `OUTCOMES`.
        unrecorded: number of ended trials that are not in MLflow yet.
        budget: number of trials to evaluate.
        rungs: number of trials that ended early, by rung.
        exceeded_limits: number of trials that exceed each limit, by metric.
        lost_attempts: number of attempts that ended without a result.
        saved_s: seconds saved, by `prediction`, `rungs` and `cache`.
        remaining_s: predicted seconds until the budget is used up; None after the end and before the first trial ended.
    """

    study: str
    stop_reason: str
    workers: tuple[WorkerStatus, ...]
    trials: Mapping[str, int]
    outcomes: Mapping[str, int]
    unrecorded: int
    budget: int
    feasible: int
    front: int
    rungs: Mapping[str, int]
    exceeded_limits: Mapping[str, int]
    lost_attempts: int
    spent_s: float
    spent_j: float
    saved_s: Mapping[str, float]
    hypervolume: float
    remaining_s: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the status in plain JSON types, as `edgeopt status --json` prints it."""
        return asdict(self)


def collect_status(study: Study) -> StudyStatus:
    """Return the progress of a study."""
    trials, workers, ranking = study.trials(), study.storage.active_workers(), study.ranking
    running = {trial.worker: trial.number for trial in trials if trial.state == "running"}
    evaluated = [trial for trial in trials if trial.state in EVALUATED_STATES]
    stop_reason, front = study.stop_reason(), ranking.front(trials)
    return StudyStatus(
        study=study.name,
        stop_reason=stop_reason,
        workers=tuple(WorkerStatus(worker=w.worker, role=w.role, trial=running.get(w.worker)) for w in workers),
        trials=dict(Counter(trial.state for trial in trials)),
        outcomes=_count_outcomes(study, trials),
        unrecorded=len(study.unrecorded()),
        budget=study.search.trials,
        feasible=_count_feasible(trials),
        front=len(front),
        rungs=dict(Counter(t.summary.refused for t in trials if t.summary is not None and t.summary.refused)),
        exceeded_limits=_count_exceeded_limits(trials),
        lost_attempts=_count_lost_attempts(trials),
        spent_s=total_spent_s(trials),
        spent_j=total_spent_j(trials),
        saved_s=_saved_s(trials),
        hypervolume=ranking.hypervolume(trials, front),
        remaining_s=None if stop_reason else _remaining_s(study, evaluated, max(1, len(workers))),
    )


def progress_metrics(study: Study, last: Trial) -> tuple[dict[str, float], int]:
    """Return metrics of the study at the end of the trial `last`, and the number of trials ended by then.

    Later trials do not change the metrics, so they can be logged at any time.
    """
    trials = [trial for trial in study.trials() if trial.state in ENDED_STATES and _end(trial) <= _end(last)]
    front = study.ranking.front(trials)
    states = Counter(trial.state for trial in trials)
    metrics = {f"trials/{state}": float(count) for state, count in states.items()}
    metrics |= {
        "progress/feasible": float(_count_feasible(trials)),
        "progress/front": float(len(front)),
        "progress/hypervolume": study.ranking.hypervolume(trials, front),
        "progress/attempts_lost": float(_count_lost_attempts(trials)),
        "spent/trials_s": total_spent_s(trials),
        "spent/trials_j": total_spent_j(trials),
    }
    metrics |= {f"saved/{source}_s": seconds for source, seconds in _saved_s(trials).items()}
    return metrics, len(trials)


def _end(trial: Trial) -> tuple[float, int]:
    return trial.ended_s or 0.0, trial.number


def _count_outcomes(study: Study, trials: list[Trial]) -> dict[str, int]:
    """Return the number of trials by outcome, in the order and words of `OUTCOMES`."""
    ranks = study.ranking.ranks(trials)
    counts = Counter(snapshot_trial(trial, ranks.get(trial.number)).outcome for trial in trials)
    return {words: counts[outcome] for outcome, words in OUTCOMES.items() if counts[outcome]}


def _count_feasible(trials: list[Trial]) -> int:
    return sum(1 for trial in trials if trial.summary is not None and trial.summary.feasible)


def _count_lost_attempts(trials: list[Trial]) -> int:
    return sum(trial.attempt - 1 for trial in trials)


def _count_exceeded_limits(trials: list[Trial]) -> dict[str, int]:
    """Return the number of trials that exceed each limit, by measurement or prediction."""
    verdicts = [item for trial in trials if trial.summary is not None for item in trial.summary.verdicts.items()]
    return dict(Counter(metric for metric, v in verdicts if not v.satisfied and v.excess is not None and v.excess > 0))


def _saved_s(trials: list[Trial]) -> dict[str, float]:
    """Return the seconds saved by prediction, by early stopping and by the cache.

    The savings of refused and stopped trials are relative to the median time of a completely evaluated trial.
    """
    summaries = [trial.summary for trial in trials if trial.summary is not None]
    complete = [s.spent_s + sum(s.saved_s.values()) for s in summaries if s.metrics and not s.refused and not s.failure]
    median_s = statistics.median(complete) if complete else 0.0
    refused = sum(1 for trial in trials if trial.state == "refused")
    stopped = [trial.summary for trial in trials if trial.state == "stopped" and trial.summary is not None]
    return {
        "prediction": refused * median_s,
        "rungs": sum(max(0.0, median_s - s.spent_s - sum(s.saved_s.values())) for s in stopped),
        "cache": sum(sum(s.saved_s.values()) for s in summaries),
    }


def _remaining_s(study: Study, evaluated: list[Trial], workers: int) -> float | None:
    """Return the predicted seconds until the budget of trials is used up; None before the first trial ends."""
    spent = [trial.summary.spent_s for trial in evaluated if trial.summary is not None]
    if not spent:
        return None
    return max(0, study.search.trials - len(evaluated)) * statistics.mean(spent) / workers
