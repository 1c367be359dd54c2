"""Record results on the tracking server, and retry while the server does not answer.

The trial storage is the queue: an ended trial keeps its complete result there until the server has it. If a worker ends
before that, another worker or `edgeopt sync` records the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from edgeopt.cache.entry_locks import protect_paths
from edgeopt.core.result import TrialResult
from edgeopt.errors import TrackingError, UnreachableError
from edgeopt.search.status import progress_metrics
from edgeopt.search.storage.trial import Trial
from edgeopt.search.study import Study

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Pause after the first failed call to the server, and the longest pause. Each failure doubles the pause."""
PUBLISH_INTERVAL_S, MAX_PUBLISH_SHARE = 10.0, 0.02
"""Shortest time between two publications of all trials, and the largest share of time that they may take."""


class TrackingLog(Protocol):
    """Recorder of one study on the tracking server.

    Every call may be repeated. Each method raises UnreachableError if the server does not answer, and TrackingError if
    it rejects the call.
    """

    def begin(self, trial: Trial) -> str:
        """Create the run of a trial that starts now and return the run id."""
        ...

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        """Log the complete result of a trial and return the run id.

        Args:
            front: numbers of the trials on the front. Only their engines are kept.
        """
        ...

    def kill(self, number: int, attempt: int, reason: str) -> None:
        """End the run of an attempt as killed."""
        ...

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        """Log metrics of the study after `step` ended trials, at a time in Unix seconds."""
        ...

    def publish(self) -> None:
        """Upload the current state of all trials for viewers."""
        ...

    def open_attempts(self) -> set[tuple[int, int]]:
        """Return number and attempt of the trials whose run has not ended."""
        ...


@dataclass(slots=True, kw_only=True)
class _PendingResult:
    """A result that is not recorded yet, and the locks that protect its files in the cache from eviction."""

    result: TrialResult
    file_locks: ExitStack


class TrackingOutbox:
    """Outbox of one worker: records its ended trials on the tracking server, in order.

    Args:
        study: the study, opened by the worker.
        log: recorder of the study.
        on_message: receives one line when the server fails, and one when the pending results are recorded.
        clock: returns seconds.
    """

    def __init__(
        self,
        study: Study,
        log: TrackingLog,
        on_message: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._study, self._log, self._on_message, self._clock = study, log, on_message, clock
        self._pending: dict[int, _PendingResult] = {}
        self._run_ids: dict[tuple[int, int], str] = {}
        self._last_error = ""
        self._failing_since_s = self._retry_at_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._publish_at_s = -math.inf

    def begin(self, trial: Trial) -> Trial:
        """Create the run of a trial and return the trial with its run id.

        If the server does not answer, the run id is empty and `flush` creates the run at the end of the trial.
        """
        with self._note_errors():
            if self._may_call:
                self._run_ids[trial.number, trial.attempt] = self._log.begin(trial)
        return self._with_run_id(trial)

    def kill(self, number: int, attempt: int, reason: str) -> None:
        """End the run of an attempt as killed. If the server does not answer, `end_stale_runs` ends it later."""
        with self._note_errors():
            if self._may_call:
                self._log.kill(number, attempt, reason)

    def flush(self) -> list[int]:
        """Record the ended trials of this worker and return the numbers of the recorded trials.

        The files of unrecorded trials are protected from eviction. A trial whose files are already evicted is queued
        again.
        """
        may_call, failure, recorded = self._may_call, None, []
        own = [trial for trial in self._study.unrecorded() if trial.worker == self._study.worker]
        for trial in own:
            pending = self._pending.get(trial.number) or self._load_pending(trial)
            if pending is None or not may_call:
                continue
            try:
                self._record(trial, pending)
                recorded.append(trial.number)
            except TrackingError as error:
                failure, may_call = error, not isinstance(error, UnreachableError)
        try:
            if recorded and failure is None:
                self._publish()
        except TrackingError as error:
            failure = error
        if failure is not None:
            self._note_failure(failure)
        elif may_call and self._last_error:
            if recorded:
                self._on_message(f"MLflow answers again; recorded {len(recorded)} trials")
            self._last_error, self._pause_s = "", FIRST_PAUSE_S
        return recorded

    def end_stale_runs(self) -> None:
        """End the runs of attempts that are no longer in progress, such as those of dead workers."""
        with self._note_errors():
            if not self._may_call:
                return
            open_runs = self._log.open_attempts()  # read before the trials, so a run that starts now is not included
            for number, attempt in sorted(open_runs - self._study.open_attempts()):
                self._log.kill(number, attempt, "the attempt was abandoned")

    def raise_if_failing(self, patience_s: float) -> None:
        """Raise TrackingError if results are not recorded and the server has failed for `patience_s` seconds."""
        if self._pending and self._clock() - self._failing_since_s >= patience_s:
            raise TrackingError(
                f"{len(self._pending)} trials are stored locally and not in MLflow yet: {self._last_error}",
                hint=f"Once it answers, send them: edgeopt sync {self._study.name}",
            )

    def close(self) -> None:
        """Release the protection of all files from eviction."""
        for pending in self._pending.values():
            pending.file_locks.close()
        self._pending.clear()

    @property
    def _may_call(self) -> bool:
        return not self._last_error or self._clock() >= self._retry_at_s

    def _with_run_id(self, trial: Trial) -> Trial:
        return replace(trial, run_id=self._run_ids.get((trial.number, trial.attempt), ""))

    def _load_pending(self, trial: Trial) -> _PendingResult | None:
        """Load a result and protect its files; queue the trial again and return None if they were evicted."""
        result, file_locks = self._study.load_result(trial.number), ExitStack()
        if file_locks.enter_context(protect_paths(result.paths)):
            self._pending[trial.number] = _PendingResult(result=result, file_locks=file_locks)
            return self._pending[trial.number]
        file_locks.close()
        self._study.storage.discard_result(trial)
        self.kill(trial.number, trial.attempt, "the files of the result were evicted; the recipe is queued again")
        return None

    def _record(self, trial: Trial, pending: _PendingResult) -> None:
        front = {t.number for t in self._study.front()}
        run_id = self._log.record(self._with_run_id(trial), pending.result, front)
        if trial.state != "refused":  # the next evaluated trial counts refused trials
            values, step = progress_metrics(self._study, trial)
            self._log.progress(values, step, trial.ended_s or 0.0)
        self._study.storage.mark_recorded(trial, run_id=run_id)
        self._pending.pop(trial.number).file_locks.close()
        self._run_ids.pop((trial.number, trial.attempt), None)

    def _publish(self) -> None:
        started_s = self._clock()
        if started_s < self._publish_at_s:
            return
        self._log.publish()
        ended_s = self._clock()
        self._publish_at_s = ended_s + max(PUBLISH_INTERVAL_S, (ended_s - started_s) / MAX_PUBLISH_SHARE)

    @contextmanager
    def _note_errors(self) -> Iterator[None]:
        """Note a tracking error inside the block instead of raising it: tracking never stops an evaluation."""
        try:
            yield
        except TrackingError as error:
            self._note_failure(error)

    def _note_failure(self, error: TrackingError) -> None:
        now = self._clock()
        if not self._last_error:
            self._failing_since_s = now
            self._on_message(f"{error}. The sweep continues; results are stored locally until MLflow answers")
        self._last_error, self._retry_at_s = str(error), now + self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
