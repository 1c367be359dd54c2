"""Run a worker: ask for a trial, evaluate it, store and record its result, until the study is complete."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from edgeopt.core.result import Failure, TrialResult
from edgeopt.errors import StoreError
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import ENDED_STATES, Trial
from edgeopt.search.study import MAX_ATTEMPTS, Study
from edgeopt.search.workers.heartbeat import Heartbeat, LivenessMonitor, create_worker_record
from edgeopt.search.workers.tracking_outbox import TrackingLog, TrackingOutbox

POLL_S = 0.5
"""Seconds between two requests for a trial while none is available."""
GC_THRESHOLD = 100_000
"""Number of new objects before a garbage collection. MLflow's store creates many short-lived objects, and collections
took a sixth of the time between two trials with the default."""


class Watcher(Protocol):
    """Display of a worker's progress."""

    def started(self, trial: Trial) -> None:
        """Show that a trial starts."""
        ...

    def progress(self, line: str) -> None:
        """Show a progress line of the current trial."""
        ...

    def finished(self, trial: Trial, result: TrialResult) -> None:
        """Show that a trial ended."""
        ...

    def message(self, line: str) -> None:
        """Show a message that does not belong to a trial."""
        ...


class Evaluator(Protocol):
    """Evaluator of one trial at a time."""

    def run(self, params: Params, progress: Callable[[str], None]) -> TrialResult | Failure:
        """Evaluate a recipe; return a Failure if there is no result."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Collaborators of one worker.

    Attributes:
        empty_result: returns a result without measurements, for a trial whose process ended without a result.
        role: `build` builds engines and leaves their measurement to workers of role `measure`; `all` does both.
        patience_s: seconds that an idle worker waits for a tracking server that does not answer.
    """

    study: Study
    evaluator: Evaluator
    log: TrackingLog
    watcher: Watcher
    empty_result: Callable[[Params], TrialResult]
    role: str = "all"
    patience_s: float = 0.0
    monitor: LivenessMonitor = field(init=False)
    outbox: TrackingOutbox = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "monitor", LivenessMonitor(self.study.search.lease_s))
        object.__setattr__(self, "outbox", TrackingOutbox(self.study, self.log, self.watcher.message))


def run_worker(context: WorkerContext) -> None:
    """Work on the study until it is complete.

    Failures of the tracking server do not stop the work.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C. The running trial is queued again.
        StoreError: the cache cannot be written, which would fail every trial. The running trial is queued again.
        TrackingError: nothing else is left to do, and the tracking server does not have all results.
    """
    with _infrequent_garbage_collection():
        while not _run_session(context):
            pass


@contextmanager
def _infrequent_garbage_collection() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _run_session(context: WorkerContext) -> bool:
    """Work until the study is complete. Return False if other workers consider this one dead.

    A worker that ends with an exception stays registered. Other workers find its process dead and take over its trials.
    """
    study, outbox = context.study, context.outbox
    with worker_session(study, context.monitor, outbox, context.role) as heartbeat:
        while heartbeat.is_alive:
            trial = study.ask()
            if trial is not None:
                if not _run_trial(context, trial):
                    return False
            elif study.is_complete():
                break
            else:
                outbox.raise_if_failing(context.patience_s)
                time.sleep(POLL_S)
            recover_orphans(study, context.monitor, outbox)
        else:
            return False
    study.storage.unregister_worker(study.worker)
    outbox.end_stale_runs()
    return True


def sync_tracking(study: Study, log: TrackingLog, on_message: Callable[[str], None]) -> None:
    """Record the results that dead workers left unrecorded, without evaluating trials.

    Active workers record their own results. Raises TrackingError if the server fails.
    """
    monitor, outbox = LivenessMonitor(study.search.lease_s), TrackingOutbox(study, log, on_message)
    deadline = time.monotonic() + 1.5 * study.search.lease_s  # by then, dead workers of other hosts are detected
    with worker_session(study, monitor, outbox, "sync"):
        while unrecorded := study.unrecorded():
            outbox.raise_if_failing(0.0)
            if not any(trial.worker == study.worker for trial in unrecorded) and time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
            recover_orphans(study, monitor, outbox)
    study.storage.unregister_worker(study.worker)
    outbox.end_stale_runs()


@contextmanager
def worker_session(study: Study, monitor: LivenessMonitor, outbox: TrackingOutbox, role: str) -> Iterator[Heartbeat]:
    """Register as a worker under a new name, recover orphaned trials, and send heartbeats inside the block."""
    worker = create_worker_record(role)
    study.worker = worker.worker
    dead = monitor.find_dead(study.storage.active_workers())
    study.storage.register_worker(worker, dead={record.worker for record in dead})
    recover_orphans(study, monitor, outbox)
    outbox.end_stale_runs()
    try:
        with Heartbeat(study.storage, worker.worker, study.search.lease_s) as heartbeat:
            yield heartbeat
    finally:
        outbox.close()


def _run_trial(context: WorkerContext, trial: Trial) -> bool:
    """Evaluate a trial, or record one that ended without evaluation. Return False if this worker lost the trial."""
    study, outbox = context.study, context.outbox
    if trial.state in ENDED_STATES:
        outbox.flush()
        context.watcher.finished(trial, study.load_result(trial.number))
        return True
    trial = outbox.begin(trial)
    context.watcher.started(trial)
    try:
        result = _evaluate(context, trial.params)
    except (KeyboardInterrupt, StoreError) as error:
        study.storage.release(trial)
        reason = str(error) or "interrupted by Ctrl-C"
        outbox.kill(trial.number, trial.attempt, f"{reason}; the recipe is queued again")
        raise
    if context.role == "build" and not (result.failure or result.refused):
        return study.storage.release(trial, built=True)
    if not study.finish(trial, result):
        outbox.kill(trial.number, trial.attempt, "the worker was considered dead; the recipe was queued again")
        return False
    outbox.flush()
    context.watcher.finished(trial, result)
    return True


def recover_orphans(study: Study, monitor: LivenessMonitor, outbox: TrackingOutbox) -> None:
    """Queue the running trials of dead workers again, and record their ended trials."""
    others = [worker for worker in study.storage.active_workers() if worker.worker != study.worker]
    for worker in monitor.find_dead(others):
        for trial in study.reclaim(worker):
            consequence = (
                "the recipe is queued again"
                if trial.attempt < MAX_ATTEMPTS
                else f"the trial failed after {trial.attempt} attempts"
            )
            outbox.kill(trial.number, trial.attempt, f"worker {worker.worker} died; {consequence}")
    outbox.flush()


def _evaluate(context: WorkerContext, params: Params) -> TrialResult:
    """Return the result of a recipe; a failed one if its process ended without a result.

    Raises StoreError if the evaluation failed because the cache cannot be written.
    """
    outcome = context.evaluator.run(params, context.watcher.progress)
    failure = outcome if isinstance(outcome, Failure) else outcome.failure
    if failure is not None and failure.kind == StoreError.__name__:
        raise StoreError(failure.message)
    return replace(context.empty_result(dict(params)), failure=outcome) if isinstance(outcome, Failure) else outcome
