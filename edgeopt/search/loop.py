"""A worker of a study: ask, evaluate, keep, record, until the study is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from edgeopt.errors import StoreError
from edgeopt.result import Failure, TrialResult
from edgeopt.search.ledger import DONE, Row
from edgeopt.search.membership import Heart, Watch, myself
from edgeopt.search.parameter import Params
from edgeopt.search.status import progress
from edgeopt.search.study import ATTEMPTS, Study
from edgeopt.store.uses import using

IDLE_S = 0.5
"""How often a worker looks for a trial while there is none for it."""


class Watcher(Protocol):
    """Shows a person how the sweep goes."""

    def started(self, row: Row) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, row: Row, result: TrialResult) -> None: ...


class Log(Protocol):
    """The recorder bound to one study. A trial's attempts are told apart; each call may be repeated."""

    def begin(self, row: Row) -> str:
        """The id of the run of a trial that starts now."""
        ...

    def record(self, row: Row, result: TrialResult) -> str:
        """Log a finished trial whole; the id of its run."""
        ...

    def kill(self, number: int, attempt: int, why: str) -> None: ...

    def progress(self, values: Mapping[str, float], step: int) -> None:
        """Where the study stands after so many trials."""
        ...

    def open_attempts(self) -> set[tuple[int, int]]:
        """Number and attempt of the trials whose run has not ended."""
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
    """

    study: Study
    evaluator: Evaluates
    log: Log
    watcher: Watcher
    blank: Callable[[Params], TrialResult]
    role: str = "all"
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "watch", Watch(self.study.search.lease_s))


def run(sweep: Sweep) -> None:
    """Work on the study until it is over.

    A Ctrl-C queues the trial at work again and goes up. So does a cache that cannot be written, as StoreError:
    every other trial would end as this one did, and none of them is at fault.
    """
    while not _serve(sweep):
        pass


def _serve(sweep: Sweep) -> bool:
    """Work under one name until the study is over (True), or the others took this worker for dead.

    Whoever ends in any other way is found dead: what it left is for the others.
    """
    study, member = sweep.study, myself(sweep.role)
    study.worker = member.worker
    study.ledger.join(member, dead={m.worker for m in sweep.watch.dead(study.ledger.members())})
    _inherit(sweep)
    _tidy(sweep)
    with Heart(study.ledger, member.worker, study.search.lease_s) as heart:
        while heart.trusted:
            row = study.ask()
            if row is not None:
                if not _work(sweep, row):
                    return False
            elif study.settled():
                break
            else:
                time.sleep(IDLE_S)
            _inherit(sweep)
        else:
            return False
    study.ledger.leave(member.worker)
    _tidy(sweep)
    return True


def _work(sweep: Sweep, row: Row) -> bool:
    """Evaluate one trial, or record one that was refused before any work; whether it was this worker's to the end."""
    study, log = sweep.study, sweep.log
    if row.state in DONE:
        result = study.result(row.number)
        _record(sweep, row, result)
        sweep.watcher.finished(row, result)
        return True
    row = replace(row, run_id=log.begin(row))
    sweep.watcher.started(row)
    try:
        result = _evaluated(sweep, row.params)
    except (KeyboardInterrupt, StoreError) as error:
        study.ledger.release(row)
        log.kill(row.number, row.attempt, f"{str(error) or 'interrupted by Ctrl-C'}; the recipe is queued again")
        raise
    if sweep.role == "build" and not (result.failure or result.refused):
        return study.ledger.release(row, built=True)
    if not study.finish(row, result):
        log.kill(row.number, row.attempt, "its worker was taken for dead; the recipe was queued again")
        return False
    _record(sweep, row, result)
    sweep.watcher.finished(row, result)
    return True


def _record(sweep: Sweep, row: Row, result: TrialResult) -> None:
    study = sweep.study
    study.ledger.annotate(row, run_id=sweep.log.record(row, result))
    if row.state not in DONE:  # what was refused before any work is counted with the next trial
        values = progress(study)
        sweep.log.progress(values, round(sum(values.get(f"trials/{state}", 0.0) for state in DONE)))


def _inherit(sweep: Sweep) -> None:
    """Queue again what dead workers had begun, and record what they had finished."""
    study, log = sweep.study, sweep.log
    others = [member for member in study.ledger.members() if member.worker != study.worker]
    for member in sweep.watch.dead(others):
        for row in study.bury(member):
            follows = (
                "the recipe is queued again" if row.attempt < ATTEMPTS else "so did those before it: it has failed"
            )
            log.kill(row.number, row.attempt, f"its worker {member.worker} died; {follows}")
    for row in study.unrecorded():
        result = study.result(row.number)
        with using(result.paths) as there:
            if there:
                _record(sweep, row, result)
            else:  # the cache has evicted what is to be logged
                study.ledger.forget(row)
                log.kill(row.number, row.attempt, "its files were evicted; the recipe is queued again")


def _tidy(sweep: Sweep) -> None:
    """End runs whose trial is not at work any more: their worker died between two words."""
    begun = sweep.log.open_attempts()  # read first: what begins from now on is not among them
    for number, attempt in sorted(begun - sweep.study.open_attempts()):
        sweep.log.kill(number, attempt, "the sweep was ended while this trial ran")


def _evaluated(sweep: Sweep, params: Params) -> TrialResult:
    outcome = sweep.evaluator.run(params, sweep.watcher.progress)
    failure = outcome if isinstance(outcome, Failure) else outcome.failure
    if failure is not None and failure.kind == StoreError.__name__:
        raise StoreError(failure.message)
    return replace(sweep.blank(dict(params)), failure=outcome) if isinstance(outcome, Failure) else outcome
