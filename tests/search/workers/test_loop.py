from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.studies import (
    FAILED,
    FakeTrackingLog,
    ScriptedEvaluator,
    dead_worker,
    open_study,
    predict_by_bits,
    worker_context,
)

from edgeopt.core.artifact import ArtifactSummary
from edgeopt.core.result import Failure, TrialResult
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError, StoreError
from edgeopt.search.prediction import PREDICTION
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.study import MAX_ATTEMPTS, Study
from edgeopt.search.workers import loop
from edgeopt.search.workers.heartbeat import create_worker_record
from edgeopt.search.workers.loop import WorkerContext, run_worker

FULL = Failure(stage="build", kind="StoreError", message="cache: stage engine cannot be written. Free space")


@pytest.fixture(autouse=True)
def fast_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POLL_S", 0.01)


def states(study: Study) -> list[tuple[str, int, bool]]:
    return [(trial.state, trial.attempt, trial.recorded) for trial in study.trials()]


def evaluated_bits(context: WorkerContext) -> list[Any]:
    assert isinstance(context.evaluator, ScriptedEvaluator)
    return [params["bits"] for params in context.evaluator.evaluated]


def claim_and_die(folder: Path, **fields: Any) -> tuple[Study, Trial]:
    """Return the study of a dead worker and the trial that it was running."""
    dead = open_study(folder, worker="dead", **fields)
    dead.storage.register_worker(dead_worker("dead"))
    trial = dead.ask()
    assert trial is not None
    return dead, trial


# evaluation


def test_worker_records_every_trial_of_the_budget(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    context = worker_context(open_study(tmp_path), [samples.result(), FAILED], log)
    run_worker(context)
    assert log.calls == [(call, number, 1) for number in range(4) for call in ("begin", "record")]
    assert sorted(states(context.study)) == [("failed", 1, True)] + [("finished", 1, True)] * 3
    assert [trial.run_id for trial in context.study.trials()] == [f"run {n}/1" for n in range(4)]
    assert context.watcher.events == [(event, n) for n in range(4) for event in ("started", "finished")]  # type: ignore[attr-defined]
    assert context.study.storage.active_workers() == []


def test_evaluator_failure_is_a_failed_trial(tmp_path: Path) -> None:
    context = worker_context(open_study(tmp_path), [FAILED] * 4)
    run_worker(context)
    assert [context.study.load_result(n).failure for n in range(4)] == [FAILED] * 4
    assert context.study.ranks() == {}


def test_refused_trial_is_recorded_without_evaluation(tmp_path: Path) -> None:
    log, unreachable = FakeTrackingLog(), (Limit(metric="memory/peak_rss_mib", unit="MiB", absolute=1.0),)
    context = worker_context(open_study(tmp_path, unreachable, predict_trial=predict_by_bits), [], log)
    run_worker(context)
    assert evaluated_bits(context) == []
    assert log.calls == [("record", number, 1) for number in range(4)]
    assert states(context.study) == [("refused", 1, True)] * 4
    assert context.watcher.events == [("finished", n) for n in range(4)]  # type: ignore[attr-defined]


def test_complete_study_stays_unchanged(tmp_path: Path) -> None:
    run_worker(worker_context(open_study(tmp_path)))
    log = FakeTrackingLog()
    resumed = worker_context(open_study(tmp_path), [], log)
    run_worker(resumed)
    assert (evaluated_bits(resumed), log.calls) == ([], [])


# failures that stop the worker


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (KeyboardInterrupt, KeyboardInterrupt, "interrupted by Ctrl-C; the recipe is queued again"),
        (FULL, StoreError, "stage engine cannot be written"),
        (replace(samples.result(), failure=FULL), StoreError, "stage engine cannot be written"),
    ],
    ids=["Ctrl-C", "process without result", "failed result"],
)
def test_external_failure_stops_worker_and_requeues_trial(
    tmp_path: Path, answer: Any, error: type[BaseException], reason: str
) -> None:
    log = FakeTrackingLog()
    context = worker_context(open_study(tmp_path), [samples.result(), answer], log)
    with pytest.raises(error):
        run_worker(context)
    assert log.calls[-2:] == [("begin", 1, 1), ("kill", 1, 1)]
    assert reason in log.kill_reasons[0]
    assert states(context.study) == [("finished", 1, True), ("waiting", 2, False)]
    resumed_log = FakeTrackingLog()
    resumed = worker_context(open_study(tmp_path), [], resumed_log)
    run_worker(resumed)
    assert resumed_log.calls[:2] == [("begin", 1, 2), ("record", 1, 2)], "the trial is the next one"
    assert evaluated_bits(resumed)[0] == evaluated_bits(context)[1]
    assert len(resumed.study.trials()) == 4


# recovery from dead workers


def test_trial_of_dead_worker_is_retried_first(tmp_path: Path) -> None:
    dead, trial = claim_and_die(tmp_path)
    log = FakeTrackingLog()
    log.begin(trial)
    context = worker_context(open_study(tmp_path), [], log)
    run_worker(context)
    assert log.calls[1:4] == [("kill", 0, 1), ("begin", 0, 2), ("record", 0, 2)]
    assert log.kill_reasons == ["worker dead died; the recipe is queued again"]
    assert evaluated_bits(context)[0] == trial.params["bits"]
    assert not dead.finish(trial, samples.result()), "a late result is rejected"


def test_trial_that_kills_workers_is_recorded_as_failed(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    for n in range(MAX_ATTEMPTS):
        study = open_study(tmp_path, worker=f"w{n}")
        study.storage.register_worker(dead_worker(f"w{n}"))
        trial = study.ask()
        assert trial is not None
        assert trial.number == 0
        log.begin(trial)
        if n < MAX_ATTEMPTS - 1:
            study.reclaim(dead_worker(f"w{n}"))
    context = worker_context(open_study(tmp_path), [], log)
    run_worker(context)
    assert states(context.study)[0] == ("failed", MAX_ATTEMPTS, True)
    assert "queued again" not in log.kill_reasons[0]
    assert "failed" in log.kill_reasons[0]
    assert log.open_runs == set(), "the runs of earlier attempts are ended too"
    assert len(context.study.trials()) == 4


@pytest.mark.parametrize("logged", [False, True], ids=["before record", "before mark_recorded"])
def test_result_of_dead_worker_is_recorded_once(tmp_path: Path, logged: bool) -> None:
    dead, trial = claim_and_die(tmp_path)
    dead.finish(trial, samples.result(decode_ms=0.25))
    log = FakeTrackingLog()
    log.begin(trial)
    if logged:
        log.record(trial, samples.result(), set())
    context = worker_context(open_study(tmp_path), [], log)
    run_worker(context)
    assert log.calls.count(("record", 0, 1)) == 1 + logged
    assert ("kill", 0, 1) not in log.calls
    assert states(context.study)[0] == ("finished", 1, True)
    assert len(evaluated_bits(context)) == 3
    log.calls.clear()
    run_worker(worker_context(open_study(tmp_path), [], log))
    assert log.calls == [], "recorded results are not recorded again"


def test_result_is_recorded_when_reclaim_answer_is_lost(tmp_path: Path) -> None:
    """The transaction succeeds, but the new owner sees no reclaimed trials."""
    dead, trial = claim_and_die(tmp_path)
    dead.finish(trial, samples.result())
    study, log = open_study(tmp_path), FakeTrackingLog()
    reclaim = type(study.storage).reclaim
    study.storage.reclaim = lambda *args, **kwargs: reclaim(study.storage, *args, **kwargs) and []  # type: ignore[method-assign,func-returns-value]
    run_worker(worker_context(study, [], log))
    assert ("record", 0, 1) in log.calls
    assert study.is_complete()


@pytest.mark.parametrize("evicted", ["engine", "artifact"])
def test_evicted_result_is_evaluated_again(tmp_path: Path, evicted: str) -> None:
    dead, trial = claim_and_die(tmp_path)
    files: dict[str, Any] = {
        "engine": ArtifactSummary(directory=str(tmp_path / "e"), digest="", manifest_sha256="", size_bytes=1)
    }
    if evicted == "artifact":
        files = {"artifacts": {"logs": str(tmp_path / "logs")}}
    dead.finish(trial, replace(samples.result(), **files))
    log = FakeTrackingLog()
    log.begin(trial)
    context = worker_context(open_study(tmp_path), [], log)
    run_worker(context)
    assert log.calls[1:4] == [("kill", 0, 1), ("begin", 0, 2), ("record", 0, 2)]
    assert "evicted" in log.kill_reasons[0]
    assert evaluated_bits(context)[0] == trial.params["bits"]
    assert states(context.study)[0] == ("finished", 2, True)


def test_stale_runs_are_ended(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    log.open_runs = {(0, 1), (7, 2)}
    run_worker(worker_context(open_study(tmp_path), [], log))
    assert sorted(log.calls[:2]) == [("kill", 0, 1), ("kill", 7, 2)]


def test_run_of_a_new_trial_is_not_stale(tmp_path: Path) -> None:
    """The trial starts after the runs are read and before the trials are read."""
    other = open_study(tmp_path, worker="other")

    class LogWithConcurrentStart(FakeTrackingLog):
        def open_attempts(self) -> set[tuple[int, int]]:
            trial = other.ask()
            if trial is not None:
                self.begin(trial)
                started.append(trial)
            return super().open_attempts()

    log, started = LogWithConcurrentStart(), list[Trial]()
    worker_context(open_study(tmp_path), [], log).outbox.end_stale_runs()
    assert len(started) == 1
    assert log.open_runs == {(0, 1)}


# roles


def test_builder_hands_trials_to_measuring_worker(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    measurer = worker_context(open_study(tmp_path, built=True, trials=2), [], log, role="measure")

    def measure_next() -> None:
        """Measure a built trial, as another process would at this time."""
        trial = measurer.study.ask()
        assert trial is not None
        loop._run_trial(measurer, trial)

    class StudyWithMeasurer(Study):
        def is_complete(self) -> bool:
            measure_next()
            return Study.is_complete(self)

    builder = worker_context(open_study(tmp_path, built=False, trials=2), [samples.result(), FAILED], log, role="build")
    builder = replace(builder, study=with_class(builder.study, StudyWithMeasurer))
    measurer.study.worker = "measurer"
    run_worker(builder)
    assert log.calls == [("begin", 0, 1), ("begin", 1, 1), ("record", 1, 1), ("begin", 0, 1), ("record", 0, 1)]
    assert evaluated_bits(measurer) == evaluated_bits(builder)[:1], "a failed trial is not measured"
    assert states(builder.study) == [("finished", 1, True), ("failed", 1, True)]
    assert builder.study.trials()[0].worker == "measurer"


def with_class(study: Study, kind: type[Study]) -> Study:
    return kind(
        storage=study.storage,
        search=study.search,
        objectives=study.objectives,
        limits=study.limits,
        worker=study.worker,
        built=study.built,
    )


# workers that are considered dead


def result_after(action: Callable[[], None]) -> Callable[[], TrialResult]:
    """Return an answer of the evaluator that runs `action` during the evaluation."""

    def answer() -> TrialResult:
        action()
        return samples.result(decode_ms=0.123)

    return answer


def test_worker_considered_dead_continues_under_new_name(tmp_path: Path) -> None:
    study, log, names = open_study(tmp_path), FakeTrackingLog(), list[str]()

    def reclaim_this_worker() -> None:
        names.append(study.worker)
        (worker,) = study.storage.active_workers()
        study.storage.reclaim(
            worker, new_owner="other", max_attempts=MAX_ATTEMPTS, summarize_failure=lambda _: TrialSummary()
        )

    context = worker_context(study, [result_after(reclaim_this_worker)], log)
    run_worker(context)
    assert study.worker not in names, "it continues under another name"
    assert log.calls[:4] == [("begin", 0, 1), ("kill", 0, 1), ("begin", 0, 2), ("record", 0, 2)]
    assert "considered dead" in log.kill_reasons[0]
    assert states(study) == [("finished", 2, True)] + [("finished", 1, True)] * 3
    assert study.load_result(0).metrics["latency/decode_p50_ms"] != 0.123
    assert study.storage.active_workers() == []


def test_worker_with_other_code_is_rejected(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.storage.register_worker(replace(create_worker_record("all"), code="0+other"))
    with pytest.raises(ConfigError, match="0\\+other"):
        run_worker(worker_context(open_study(tmp_path)))
    study.storage.register_worker(replace(dead_worker("w2"), code="0+other"))
    study.storage.unregister_worker(study.storage.active_workers()[0].worker)
    run_worker(worker_context(open_study(tmp_path)))
    assert len(study.trials()) == 4, "dead workers of this host do not block others"


def test_trial_refused_during_evaluation_has_ended(tmp_path: Path) -> None:
    refused = replace(samples.result(), refused=PREDICTION)
    context = worker_context(open_study(tmp_path, trials=1), [refused])
    run_worker(context)
    assert [trial.state for trial in context.study.trials()] == ["refused", "finished"]
