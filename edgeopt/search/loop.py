"""The sweep: ask, evaluate, save, record, tell, until the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgeopt.errors import StoreError
from edgeopt.result import Failure, TrialResult
from edgeopt.search.space import Params
from edgeopt.search.study import Study
from edgeopt.search.worker import Worker


class Watcher(Protocol):
    """Shows a person how the sweep goes."""

    def started(self, number: int, params: Params) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, number: int, result: TrialResult) -> None: ...


class Log(Protocol):
    """The recorder bound to one study."""

    def begin(self, number: int, params: Params) -> None: ...

    def record(self, number: int, params: Params, result: TrialResult) -> None: ...

    def kill(self, number: int, why: str) -> None: ...

    def open_trials(self) -> list[int]:
        """Trials whose run has not ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What one sweep works with.

    Attributes:
        blank: a result without figures, for trials whose process ended without an answer.
    """

    study: Study
    worker: Worker
    log: Log
    watcher: Watcher
    blank: Callable[[Params], TrialResult]


def run(sweep: Sweep) -> None:
    """Continue the study until its budget is spent.

    A Ctrl-C queues the trial at work again and goes up. So does a cache that cannot be written, as StoreError:
    every other trial would end as this one did, and none of them is at fault.
    """
    study, log = sweep.study, sweep.log
    study.recover(log.record)
    for number in log.open_trials():
        log.kill(number, "the sweep was ended while this trial ran")
    study.enqueue_known()
    try:
        while (asked := study.ask()) is not None:
            trial, params = asked
            try:
                log.begin(trial.number, params)
                sweep.watcher.started(trial.number, params)
                result = _evaluated(sweep, params)
            except (KeyboardInterrupt, StoreError) as error:
                study.interrupt(trial)
                log.kill(trial.number, f"{str(error) or 'interrupted by Ctrl-C'}; the recipe is queued again")
                raise
            study.save(trial.number, result)
            log.record(trial.number, params, result)
            study.tell(trial, result)
            sweep.watcher.finished(trial.number, result)
    finally:
        sweep.worker.close()


def _evaluated(sweep: Sweep, params: Mapping[str, Any]) -> TrialResult:
    outcome = sweep.worker.run(params, sweep.watcher.progress)
    failure = outcome if isinstance(outcome, Failure) else outcome.failure
    if failure is not None and failure.kind == StoreError.__name__:
        raise StoreError(failure.message)
    if isinstance(outcome, Failure):
        blank = sweep.blank(dict(params))
        return TrialResult(
            recipe=blank.recipe, target=blank.target, device=blank.device, emulated=blank.emulated, failure=outcome
        )
    return outcome
