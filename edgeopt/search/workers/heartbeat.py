"""Who works on a study: a worker's identity, its signs of life, and who of the others is dead."""

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
from edgeopt.search.storage.trial_store import Ledger, Member

BEATS_A_LEASE = 6


def myself(role: str) -> Member:
    """This process as a worker, under a name of its own."""
    return Member(
        worker=f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}",
        host=process_identity.host_id(),
        process=process_identity.identity(os.getpid()),
        role=role,
        code=f"{edgeopt.__version__}+{code_digest()[:12]}",
        beat=0,
    )


class LivenessMonitor:
    """Finds the dead: on this host by the kernel's word, elsewhere by a counter that stands still.

    Only this process's own clock counts, from when it saw a counter first.
    """

    def __init__(self, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._seen: dict[str, tuple[int, float]] = {}

    def dead(self, members: Iterable[Member]) -> list[Member]:
        found, now, here = [], self._clock(), process_identity.host_id()
        for member in members:
            beat, since = self._seen.get(member.worker, (-1, now))
            if beat != member.beat:
                beat, since = member.beat, now
            self._seen[member.worker] = beat, since
            gone = member.host == here and not process_identity.is_alive(member.process)
            if gone or now - since > self._lease_s:
                found.append(member)
        return found


class Heartbeat:
    """Signs of life of a worker for as long as the block lasts, whatever the worker itself waits for."""

    def __init__(self, ledger: Ledger, worker: str, lease_s: float) -> None:
        self._ledger, self._worker, self._pause_s = ledger, worker, lease_s / BEATS_A_LEASE
        self._end = threading.Event()
        self.trusted = True
        """Whether the others took this worker for alive when it beat last."""
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while self.trusted and not self._end.wait(self._pause_s):
            try:
                self.trusted = self._ledger.beat(self._worker)
            except StoreError:  # the store is gone for good, which the worker hears itself when it needs it
                return
