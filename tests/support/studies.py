"""What the tests of the search share: a small study, invented forecasts and results, and a log that listens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeopt.core.result import Failure, Measurement, TrialResult
from edgeopt.core.target import Limit
from edgeopt.machine import process_identity
from edgeopt.search.pareto.front import Objective
from edgeopt.search.prediction import Prediction, PredictTrial
from edgeopt.search.space.definition import Search
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.storage.worker_record import WorkerRecord
from edgeopt.search.study import Study
from edgeopt.search.workers.loop import WorkerContext
from support import samples

DECODE, RATIO, RSS = "latency/decode_p50_ms", "quality/perplexity_ratio", "memory/peak_rss_mib"
SIZE = "size/engine_mib"
LIMITS = (
    Limit(metric=RATIO, unit="", absolute=1.15),
    Limit(metric=DECODE, unit="ms", absolute=1.04),
    Limit(metric=RSS, unit="MiB", absolute=90.0),
)
FAILED = Failure(stage="build", kind="BuildError", message="no")


def search(**more: Any) -> Search:
    known: dict[str, Any] = {
        "study": "s",
        "objectives": {RATIO: "minimize", DECODE: "minimize"},
        "sampler": "random",
        "trials": 4,
        "refine": 0.0,
        "spread": 0,
        "parameters": {"bits": {"choices": [4, 8, 16, 32]}},
    }
    return Search(**known | more)


def study(
    folder: Path,
    limits: tuple[Limit, ...] = LIMITS,
    *,
    predict_trial: PredictTrial | None = None,
    worker: str = "w",
    built: bool | None = None,
    url: str = "",
    **more: Any,
) -> Study:
    """A study that was opened."""
    found = search(**more)
    objectives = tuple(Objective(metric=m, direction=d) for m, d in found.objectives.items())  # type: ignore[arg-type]
    made = Study(
        storage=TrialStorage(url or file_url(folder / "studies.db"), found.study),
        search=found,
        objectives=objectives,
        limits=limits,
        predict_trial=predict_trial,
        worker=worker,
        built=built,
    )
    made.open({"name": "sweep"})
    return made


def finish(opened: Study, result: TrialResult | None = None) -> Trial:
    """Ask, and finish what was asked."""
    trial = opened.ask()
    assert trial is not None
    assert trial.state == "running"
    assert opened.finish(trial, result or samples.result())
    return next(r for r in opened.trials() if r.number == trial.number)


def recorded(opened: Study, trial: Trial) -> None:
    opened.storage.mark_recorded(trial, run_id="r")


def predicted(metric: str, value: float, unit: str = "MiB") -> Measurement:
    return Measurement(
        metric=metric, unit=unit, value=value, low=value, high=value, count=1, method="invented", kind="predicted"
    )


def forecast(expected_error: float = 0.0, failure: Failure | None = None, **figures: float) -> Prediction:
    """Of `size` in MiB and `rss` in MiB."""
    names = {"size": SIZE, "rss": RSS}
    blank = replace(samples.result(), measurements=(), verdicts=(), timings_s={})
    predictions = tuple(predicted(names[name], value) for name, value in figures.items())
    return Prediction(result=replace(blank, predictions=predictions, failure=failure), expected_error=expected_error)


def by_bits(params: Params) -> Prediction:
    """Fewer bits are smaller and do more damage."""
    return forecast(expected_error=4.0 ** -params["bits"], size=float(params["bits"]), rss=50.0 + params["bits"])


def dead_member(worker: str = "dead") -> WorkerRecord:
    """A worker of this host whose process has ended."""
    from edgeopt.search.workers.heartbeat import create_worker_record

    return replace(create_worker_record("all"), worker=worker, host=process_identity.host_id(), process="4194304:1")


def finished_row(number: int, params: Params, summary: TrialSummary) -> Trial:
    """A trial that is over and recorded, as the ledger tells it."""
    return Trial(
        number=number,
        params=params,
        state="finished",
        origin="sampled",
        attempt=1,
        worker="w",
        built=False,
        recorded=True,
        run_id="r",
        ended_s=1.0,
        sampler_attrs={},
        summary=summary,
        revision=number,
    )


class FakeTrackingLog:
    """What the tracking server was told, in order, and which runs it has open."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.why: list[str] = []
        self.left_open: set[tuple[int, int]] = set()
        self.progressed: list[tuple[int, dict[str, float]]] = []

    def begin(self, trial: Trial) -> str:
        self.told.append(("begin", trial.number, trial.attempt))
        self.left_open.add((trial.number, trial.attempt))
        return f"run {trial.number}/{trial.attempt}"

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        self.told.append(("record", trial.number, trial.attempt))
        self.left_open.discard((trial.number, trial.attempt))
        return f"run {trial.number}/{trial.attempt}"

    def kill(self, number: int, attempt: int, why: str) -> None:
        self.told.append(("kill", number, attempt))
        self.why.append(why)
        self.left_open.discard((number, attempt))

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        self.progressed.append((step, dict(values)))

    def publish(self) -> None: ...

    def open_attempts(self) -> set[tuple[int, int]]:
        return set(self.left_open)


class Stub:
    """An evaluator that answers from a script: a result, a failure, an exception, or what a function returns."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.tried = script, list[Params]()

    def run(self, params: Mapping[str, Any], progress: Callable[[str], None]) -> TrialResult | Failure:
        self.tried.append(dict(params))
        answer = self.script.pop(0) if self.script else samples.result()
        if isinstance(answer, type):
            raise answer
        return answer() if callable(answer) else answer  # type: ignore[no-any-return]


class Silent:
    """A watcher that keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.lines: list[str] = []

    def started(self, trial: Trial) -> None:
        self.seen.append(("started", trial.number))

    def progress(self, line: str) -> None: ...

    def finished(self, trial: Trial, result: TrialResult) -> None:
        self.seen.append(("finished", trial.number))

    def message(self, line: str) -> None:
        self.lines.append(line)


def sweep(
    opened: Study, script: list[Any] | None = None, log: FakeTrackingLog | None = None, *, role: str = "all"
) -> WorkerContext:
    blank = replace(samples.result(), measurements=(), verdicts=())
    return WorkerContext(
        study=opened,
        evaluator=Stub(script or []),  # type: ignore[arg-type]
        log=log or FakeTrackingLog(),
        watcher=Silent(),
        empty_result=lambda _: blank,
        role=role,
    )
