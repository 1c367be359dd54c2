"""Build small studies, predictions and results for tests of the search, and fake the collaborators of a worker."""

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
from edgeopt.search.workers.heartbeat import create_worker_record
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


def create_search(**fields: Any) -> Search:
    """Return a search over four bit widths with a budget of four trials; `fields` override its fields."""
    defaults: dict[str, Any] = {
        "study": "s",
        "objectives": {RATIO: "minimize", DECODE: "minimize"},
        "sampler": "random",
        "trials": 4,
        "refine": 0.0,
        "spread": 0,
        "parameters": {"bits": {"choices": [4, 8, 16, 32]}},
    }
    return Search(**defaults | fields)


def open_study(
    folder: Path,
    limits: tuple[Limit, ...] = LIMITS,
    *,
    predict_trial: PredictTrial | None = None,
    worker: str = "w",
    built: bool | None = None,
    url: str = "",
    **fields: Any,
) -> Study:
    """Open a study in `folder` or at `url`; `fields` override fields of its search."""
    search = create_search(**fields)
    objectives = tuple(Objective(metric=m, direction=d) for m, d in search.objectives.items())  # type: ignore[arg-type]
    study = Study(
        storage=TrialStorage(url or file_url(folder / "studies.db"), search.study),
        search=search,
        objectives=objectives,
        limits=limits,
        predict_trial=predict_trial,
        worker=worker,
        built=built,
    )
    study.open({"name": "sweep"})
    return study


def finish_next(study: Study, result: TrialResult | None = None) -> Trial:
    """Ask for a trial, finish it, and return its new state."""
    trial = study.ask()
    assert trial is not None
    assert trial.state == "running"
    assert study.finish(trial, result or samples.result())
    return next(t for t in study.trials() if t.number == trial.number)


def run_search(study: Study, evaluate: Callable[[Trial], TrialResult] = lambda _: samples.result()) -> list[Trial]:
    """Ask for, finish and record trials until the study is complete; return the trials that `ask` returned."""
    asked = []
    while (trial := study.ask()) is not None:
        asked.append(trial)
        if trial.state == "running":
            assert study.finish(trial, evaluate(trial))
        mark_recorded(study, trial)
    return asked


def mark_recorded(study: Study, trial: Trial) -> None:
    """Mark a trial as recorded on the tracking server."""
    study.storage.mark_recorded(trial, run_id="r")


def predicted(metric: str, value: float, unit: str = "MiB") -> Measurement:
    """Return a predicted value without an interval."""
    return Measurement(
        metric=metric, unit=unit, value=value, low=value, high=value, count=1, method="invented", kind="predicted"
    )


def prediction(expected_error: float = 0.0, failure: Failure | None = None, **values: float) -> Prediction:
    """Return a prediction of the values `size` and `rss`, both in MiB."""
    metrics = {"size": SIZE, "rss": RSS}
    empty = replace(samples.result(), measurements=(), verdicts=(), timings_s={})
    predictions = tuple(predicted(metrics[name], value) for name, value in values.items())
    return Prediction(result=replace(empty, predictions=predictions, failure=failure), expected_error=expected_error)


def predict_by_bits(params: Params) -> Prediction:
    """Predict a smaller size and a larger error for fewer bits."""
    return prediction(expected_error=4.0 ** -params["bits"], size=float(params["bits"]), rss=50.0 + params["bits"])


def dead_worker(worker: str = "dead") -> WorkerRecord:
    """Return a worker of this host whose process has ended."""
    record = create_worker_record("all")
    return replace(record, worker=worker, host=process_identity.host_id(), process="4194304:1")


def finished_trial(number: int, params: Params, summary: TrialSummary) -> Trial:
    """Return a trial that is finished and recorded."""
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
    """Tracking log that records its calls in order, and the attempts with an open run."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.kill_reasons: list[str] = []
        self.open_runs: set[tuple[int, int]] = set()
        self.logged_progress: list[tuple[int, dict[str, float]]] = []

    def begin(self, trial: Trial) -> str:
        self.calls.append(("begin", trial.number, trial.attempt))
        self.open_runs.add((trial.number, trial.attempt))
        return f"run {trial.number}/{trial.attempt}"

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        self.calls.append(("record", trial.number, trial.attempt))
        self.open_runs.discard((trial.number, trial.attempt))
        return f"run {trial.number}/{trial.attempt}"

    def kill(self, number: int, attempt: int, reason: str) -> None:
        self.calls.append(("kill", number, attempt))
        self.kill_reasons.append(reason)
        self.open_runs.discard((number, attempt))

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        self.logged_progress.append((step, dict(values)))

    def publish(self) -> None: ...

    def open_attempts(self) -> set[tuple[int, int]]:
        return set(self.open_runs)


class ScriptedEvaluator:
    """Evaluator that takes each answer from a script: a result, a failure, an exception class, or a function."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.evaluated = script, list[Params]()

    def run(self, params: Mapping[str, Any], progress: Callable[[str], None]) -> TrialResult | Failure:
        self.evaluated.append(dict(params))
        answer = self.script.pop(0) if self.script else samples.result()
        if isinstance(answer, type):
            raise answer
        return answer() if callable(answer) else answer  # type: ignore[no-any-return]


class RecordingWatcher:
    """Watcher that records events and messages."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.messages: list[str] = []

    def started(self, trial: Trial) -> None:
        self.events.append(("started", trial.number))

    def progress(self, line: str) -> None: ...

    def finished(self, trial: Trial, result: TrialResult) -> None:
        self.events.append(("finished", trial.number))

    def message(self, line: str) -> None:
        self.messages.append(line)


def worker_context(
    study: Study, script: list[Any] | None = None, log: FakeTrackingLog | None = None, *, role: str = "all"
) -> WorkerContext:
    """Return the context of a worker with fake collaborators; `script` contains the answers of its evaluator."""
    empty = replace(samples.result(), measurements=(), verdicts=())
    return WorkerContext(
        study=study,
        evaluator=ScriptedEvaluator(script or []),  # type: ignore[arg-type]
        log=log or FakeTrackingLog(),
        watcher=RecordingWatcher(),
        empty_result=lambda _: empty,
        role=role,
    )
