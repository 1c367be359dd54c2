"""Identify workers, send heartbeats and find dead workers."""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from types import TracebackType

import edgeopt
from edgeopt.cache.stage_cache import code_digest
from edgeopt.errors import StoreError
from edgeopt.machine import process_identity
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.worker_record import WorkerRecord

BEATS_PER_LEASE = 6


def create_worker_record(role: str) -> WorkerRecord:
    """Return a record of this process as a worker with a new unique name."""
    return WorkerRecord(
        worker=f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}",
        host=process_identity.host_id(),
        process=process_identity.identity(os.getpid()),
        role=role,
        code=f"{edgeopt.__version__}+{code_digest()[:12]}",
        beat=0,
    )


class LivenessMonitor:
    """Detector of dead workers.

    A worker of this host is dead once its process has ended. Any worker is dead once its heartbeat counter has not
    changed for the length of a lease. The lease starts when this monitor first sees a counter value, by its own clock.

    Args:
        lease_s: length of a lease in seconds.
        clock: returns seconds.
    """

    def __init__(self, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._seen: dict[str, tuple[int, float]] = {}
        """Last counter value and the time when it was first seen, by worker."""

    def find_dead(self, workers: Iterable[WorkerRecord]) -> list[WorkerRecord]:
        """Return the workers that are dead."""
        dead, now, this_host = [], self._clock(), process_identity.host_id()
        for worker in workers:
            beat, since = self._seen.get(worker.worker, (-1, now))
            if beat != worker.beat:
                beat, since = worker.beat, now
            self._seen[worker.worker] = beat, since
            has_ended = worker.host == this_host and not process_identity.is_alive(worker.process)
            if has_ended or now - since > self._lease_s:
                dead.append(worker)
        return dead


class Heartbeat:
    """Context manager that sends heartbeats of a worker from a thread, also while the worker is blocked.

    Attributes:
        is_alive: False once the other workers consider this worker dead.
    """

    def __init__(self, storage: TrialStorage, worker: str, lease_s: float) -> None:
        self._storage, self._worker, self._interval_s = storage, worker, lease_s / BEATS_PER_LEASE
        self._stop = threading.Event()
        self.is_alive = True
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self.is_alive and not self._stop.wait(self._interval_s):
            try:
                self.is_alive = self._storage.beat(self._worker)
            except StoreError:  # the worker gets the same error at its next access
                return
