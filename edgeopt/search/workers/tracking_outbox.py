"""What a worker tells the tracking server: at once, or in order as soon as it answers again.

The ledger is the queue. A trial that is over waits there with its whole result, and counts as recorded once the server
has all of it. What a worker could not deliver before it ended is for the others, or for `edgeopt sync`.
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
from edgeopt.search.status import progress
from edgeopt.search.storage.trial import Row
from edgeopt.search.study import Study

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""How long a server that failed is left alone; twice as long after each failure, up to the longest."""


PUBLISH_S, PUBLISHING_SHARE = 10.0, 0.02
"""How often all trials are shown at most, and the share of the time that it may take."""


class Log(Protocol):
    """The recorder bound to one study. A trial's attempts are told apart; each call may be repeated.

    Each raises UnreachableError where the server does not answer, TrackingError where it refuses.
    """

    def begin(self, row: Row) -> str:
        """The id of the run of a trial that starts now."""
        ...

    def record(self, row: Row, result: TrialResult, front: Collection[int]) -> str:
        """Log a finished trial whole; the id of its run. Engines are kept of the trials in `front` alone."""
        ...

    def kill(self, number: int, attempt: int, why: str) -> None: ...

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        """Where the study stood after so many trials, at a time in seconds since 1970."""
        ...

    def publish(self) -> None:
        """Show all trials as they stand now to those who look on."""
        ...

    def open_attempts(self) -> set[tuple[int, int]]:
        """Number and attempt of the trials whose run has not ended."""
        ...


@dataclass(slots=True, kw_only=True)
class _Parcel:
    """A result on its way, and the hold on its files in the cache."""

    result: TrialResult
    files: ExitStack


class Delivery:
    """One worker's way to the server.

    Args:
        tell: hears once when the server fails, and once when it has everything again.
    """

    def __init__(
        self, study: Study, log: Log, tell: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._study, self._log, self._tell, self._clock = study, log, tell, clock
        self._parcels: dict[int, _Parcel] = {}
        self._begun: dict[tuple[int, int], str] = {}
        self._why = ""
        self._since_s = self._again_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._publish_s = -math.inf

    def begin(self, row: Row) -> Row:
        """The trial with the id of its run, where the server gave one; else it gets its run when it is over."""
        with self._heard():
            if self._due:
                self._begun[row.number, row.attempt] = self._log.begin(row)
        return replace(row, run_id=self._begun.get((row.number, row.attempt), ""))

    def kill(self, number: int, attempt: int, why: str) -> None:
        """End the run of an attempt; where the server cannot be told now, `tidy` ends it later."""
        with self._heard():
            if self._due:
                self._log.kill(number, attempt, why)

    def deliver(self) -> list[int]:
        """Record what is over and is this worker's to record; the numbers of those that the server has now.

        What it does not take is kept from eviction until it does. A trial whose files are gone is queued again.
        """
        due, failure, done = self._due, None, []
        mine = [row for row in self._study.unrecorded() if row.worker == self._study.worker]
        for row in mine:
            parcel = self._parcels.get(row.number) or self._taken(row)
            if parcel is None or not due:
                continue
            try:
                self._send(row, parcel)
                done.append(row.number)
            except TrackingError as error:
                failure, due = error, not isinstance(error, UnreachableError)
        try:
            if done and failure is None:
                self._publish()
        except TrackingError as error:
            failure = error
        if failure is not None:
            self._failed(failure)
        elif due and self._why:
            if done:
                self._tell(f"MLflow answers again and has {len(done)} trials more")
            self._why, self._pause_s = "", FIRST_PAUSE_S
        return done

    def tidy(self) -> None:
        """End runs whose trial is not at work any more: nobody could, or lived to, tell the server."""
        with self._heard():
            if not self._due:
                return
            begun = self._log.open_attempts()  # read first: what begins from now on is not among them
            for number, attempt in sorted(begun - self._study.open_attempts()):
                self._log.kill(number, attempt, "this attempt was given up")

    def require(self, patience_s: float) -> None:
        """Raise TrackingError where the server still lacks something, after it was waited for long enough."""
        if self._parcels and self._clock() - self._since_s >= patience_s:
            raise TrackingError(
                f"{len(self._parcels)} trials are kept and not in MLflow yet: {self._why}",
                hint=f"Then send them: edgeopt sync {self._study.name}",
            )

    def close(self) -> None:
        """Keep nothing from eviction any more."""
        for parcel in self._parcels.values():
            parcel.files.close()
        self._parcels.clear()

    @property
    def _due(self) -> bool:
        return not self._why or self._clock() >= self._again_s

    def _taken(self, row: Row) -> _Parcel | None:
        """A result that is to be sent; None where its files were evicted."""
        result, files = self._study.result(row.number), ExitStack()
        if files.enter_context(protect_paths(result.paths)):
            self._parcels[row.number] = _Parcel(result=result, files=files)
            return self._parcels[row.number]
        files.close()
        self._study.ledger.forget(row)
        self.kill(row.number, row.attempt, "its files were evicted; the recipe is queued again")
        return None

    def _send(self, row: Row, parcel: _Parcel) -> None:
        begun = replace(row, run_id=self._begun.get((row.number, row.attempt), ""))
        run_id = self._log.record(begun, parcel.result, {r.number for r in self._study.front()})
        if row.state != "refused":  # what was refused before any work is counted with the next trial
            values, step = progress(self._study, row)
            self._log.progress(values, step, row.ended_s or 0.0)
        self._study.ledger.annotate(row, run_id=run_id)
        self._parcels.pop(row.number).files.close()
        self._begun.pop((row.number, row.attempt), None)

    def _publish(self) -> None:
        began = self._clock()
        if began < self._publish_s:
            return
        self._log.publish()
        ended = self._clock()
        self._publish_s = ended + max(PUBLISH_S, (ended - began) / PUBLISHING_SHARE)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What fails inside the block is noted, and stops nothing."""
        try:
            yield
        except TrackingError as error:
            self._failed(error)

    def _failed(self, error: TrackingError) -> None:
        now = self._clock()
        if not self._why:
            self._since_s = now
            self._tell(f"{error}. The sweep goes on, and what is to be logged is kept")
        self._why, self._again_s = str(error), now + self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
