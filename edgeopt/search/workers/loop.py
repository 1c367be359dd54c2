"""A worker of a study: ask, evaluate, keep, record, until the study is over."""

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
from edgeopt.search.storage.trial import DONE, Row
from edgeopt.search.study import ATTEMPTS, Study
from edgeopt.search.workers.heartbeat import Heartbeat, LivenessMonitor, myself
from edgeopt.search.workers.tracking_outbox import Delivery, Log

IDLE_S = 0.5
"""How often a worker looks for a trial while there is none for it."""


class Watcher(Protocol):
    """Shows a person how the sweep goes."""

    def started(self, row: Row) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, row: Row, result: TrialResult) -> None: ...

    def told(self, line: str) -> None:
        """Something to know that is no news of a trial."""
        ...


class Evaluates(Protocol):
    """Evaluates one trial at a time."""

    def run(self, params: Params, progress: Callable[[str], None]) -> TrialResult | Failure: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What one worker works with.

    Attributes:
        role: what it does; a worker of role `build` leaves measuring to others, one of role `measure` building.
        blank: a result without figures, for trials whose process ended without an answer.
        patience_s: how long a worker that has nothing else to do waits for a tracking server that does not answer.
    """

    study: Study
    evaluator: Evaluates
    log: Log
    watcher: Watcher
    blank: Callable[[Params], TrialResult]
    role: str = "all"
    patience_s: float = 0.0
    watch: LivenessMonitor = field(init=False)
    delivery: Delivery = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "watch", LivenessMonitor(self.study.search.lease_s))
        object.__setattr__(self, "delivery", Delivery(self.study, self.log, self.watcher.told))


def run(sweep: Sweep) -> None:
    """Work on the study until it is over.

    A Ctrl-C queues the trial at work again and goes up. So does a cache that cannot be written, as StoreError: every
    other trial would end as this one did, and none of them is at fault. A tracking server that fails stops no work;
    TrackingError where it has not got everything when nothing else is left to do.
    """
    with _seldom_collected():
        while not _serve(sweep):
            pass


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for garbage after 100,000 new objects: those of MLflow's store live briefly, and looking took a sixth of the
    time between two trials."""
    known = gc.get_threshold()
    gc.set_threshold(100_000, *known[1:])
    try:
        yield
    finally:
        gc.set_threshold(*known)


def _serve(sweep: Sweep) -> bool:
    """Work under one name until the study is over (True), or the others took this worker for dead.

    Whoever ends in any other way is found dead: what it left is for the others.
    """
    study, delivery = sweep.study, sweep.delivery
    with joined(study, sweep.watch, delivery, sweep.role) as heart:
        while heart.trusted:
            row = study.ask()
            if row is not None:
                if not _work(sweep, row):
                    return False
            elif study.settled():
                break
            else:
                delivery.require(sweep.patience_s)
                time.sleep(IDLE_S)
            inherit(study, sweep.watch, delivery)
        else:
            return False
    study.ledger.leave(study.worker)
    delivery.tidy()
    return True


def send(study: Study, log: Log, tell: Callable[[str], None]) -> None:
    """Deliver what dead workers left undelivered, and evaluate nothing.

    What belongs to workers that live is theirs to deliver. Raises TrackingError where the server fails.
    """
    watch, delivery = LivenessMonitor(study.search.lease_s), Delivery(study, log, tell)
    last = time.monotonic() + 1.5 * study.search.lease_s  # by then the dead of other hosts are known
    with joined(study, watch, delivery, "sync"):
        while left := study.unrecorded():
            delivery.require(0.0)
            if not any(row.worker == study.worker for row in left) and time.monotonic() > last:
                break
            time.sleep(IDLE_S)
            inherit(study, watch, delivery)
    study.ledger.leave(study.worker)
    delivery.tidy()


@contextmanager
def joined(study: Study, watch: LivenessMonitor, delivery: Delivery, role: str) -> Iterator[Heartbeat]:
    """Be a worker of the study inside the block, under a new name, with what the dead left."""
    member = myself(role)
    study.worker = member.worker
    study.ledger.join(member, dead={m.worker for m in watch.dead(study.ledger.members())})
    inherit(study, watch, delivery)
    delivery.tidy()
    try:
        with Heartbeat(study.ledger, member.worker, study.search.lease_s) as heart:
            yield heart
    finally:
        delivery.close()


def _work(sweep: Sweep, row: Row) -> bool:
    """Evaluate one trial, or record one that was refused before any work; whether it was this worker's to the end."""
    study, delivery = sweep.study, sweep.delivery
    if row.state in DONE:
        delivery.deliver()
        sweep.watcher.finished(row, study.result(row.number))
        return True
    row = delivery.begin(row)
    sweep.watcher.started(row)
    try:
        result = _evaluated(sweep, row.params)
    except (KeyboardInterrupt, StoreError) as error:
        study.ledger.release(row)
        delivery.kill(row.number, row.attempt, f"{str(error) or 'interrupted by Ctrl-C'}; the recipe is queued again")
        raise
    if sweep.role == "build" and not (result.failure or result.refused):
        return study.ledger.release(row, built=True)
    if not study.finish(row, result):
        delivery.kill(row.number, row.attempt, "its worker was taken for dead; the recipe was queued again")
        return False
    delivery.deliver()
    sweep.watcher.finished(row, result)
    return True


def inherit(study: Study, watch: LivenessMonitor, delivery: Delivery) -> None:
    """Queue again what dead workers had begun, and deliver what they had finished."""
    others = [member for member in study.ledger.members() if member.worker != study.worker]
    for member in watch.dead(others):
        for row in study.reclaim(member):
            follows = (
                "the recipe is queued again" if row.attempt < ATTEMPTS else "so did those before it: it has failed"
            )
            delivery.kill(row.number, row.attempt, f"its worker {member.worker} died; {follows}")
    delivery.deliver()


def _evaluated(sweep: Sweep, params: Params) -> TrialResult:
    outcome = sweep.evaluator.run(params, sweep.watcher.progress)
    failure = outcome if isinstance(outcome, Failure) else outcome.failure
    if failure is not None and failure.kind == StoreError.__name__:
        raise StoreError(failure.message)
    return replace(sweep.blank(dict(params)), failure=outcome) if isinstance(outcome, Failure) else outcome
