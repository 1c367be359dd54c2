from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.studies import FAILED, FakeTrackingLog, Stub, by_bits, dead_member, study, sweep

from edgeopt.core.result import Failure, TrialResult
from edgeopt.core.target import Limit
from edgeopt.errors import StoreError
from edgeopt.search.prediction import PREDICTION
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.study import MAX_ATTEMPTS, Study
from edgeopt.search.workers import loop
from edgeopt.search.workers.loop import WorkerContext, run_worker

FULL = Failure(stage="build", kind="StoreError", message="cache: stage engine cannot be written. Free space")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POLL_S", 0.01)


def states(opened: Study) -> list[tuple[str, int, bool]]:
    return [(trial.state, trial.attempt, trial.recorded) for trial in opened.trials()]


def tried(made: WorkerContext) -> list[Any]:
    assert isinstance(made.evaluator, Stub)
    return [params["bits"] for params in made.evaluator.tried]


def abandoned(folder: Path, **more: Any) -> tuple[Study, Trial]:
    """A trial whose worker died at once."""
    dead = study(folder, worker="dead", **more)
    dead.storage.register_worker(dead_member("dead"))
    trial = dead.ask()
    assert trial is not None
    return dead, trial


# what a worker does


def test_a_sweep_runs_until_its_budget_is_spent_and_records_every_trial(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    made = sweep(study(tmp_path), [samples.result(), FAILED], log)
    run_worker(made)
    assert log.told == [(word, number, 1) for number in range(4) for word in ("begin", "record")]
    assert sorted(states(made.study)) == [("failed", 1, True)] + [("finished", 1, True)] * 3
    assert [trial.run_id for trial in made.study.trials()] == [f"run {n}/1" for n in range(4)]
    assert made.watcher.seen == [(w, n) for n in range(4) for w in ("started", "finished")]  # type: ignore[attr-defined]
    assert made.study.storage.active_workers() == []


def test_a_process_that_ends_without_an_answer_is_a_failed_trial_with_its_cause(tmp_path: Path) -> None:
    made = sweep(study(tmp_path), [FAILED] * 4)
    run_worker(made)
    assert [made.study.load_result(n).failure for n in range(4)] == [FAILED] * 4
    assert made.study.ranks() == {}


def test_a_refused_trial_is_recorded_without_any_work(tmp_path: Path) -> None:
    log, nothing_fits = FakeTrackingLog(), (Limit(metric="memory/peak_rss_mib", unit="MiB", absolute=1.0),)
    made = sweep(study(tmp_path, nothing_fits, predict_trial=by_bits), [], log)
    run_worker(made)
    assert tried(made) == []
    assert log.told == [("record", number, 1) for number in range(4)]
    assert states(made.study) == [("refused", 1, True)] * 4
    assert made.watcher.seen == [("finished", n) for n in range(4)]  # type: ignore[attr-defined]


def test_a_study_that_is_over_is_left_as_it_is(tmp_path: Path) -> None:
    run_worker(sweep(study(tmp_path)))
    log = FakeTrackingLog()
    again = sweep(study(tmp_path), [], log)
    run_worker(again)
    assert (tried(again), log.told) == ([], [])


# what ends a worker


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (KeyboardInterrupt, KeyboardInterrupt, "interrupted by Ctrl-C; the recipe is queued again"),
        (FULL, StoreError, "stage engine cannot be written"),
        (replace(samples.result(), failure=FULL), StoreError, "stage engine cannot be written"),
    ],
    ids=["Ctrl-C", "cache that cannot be written", "told by the evaluation"],
)
def test_what_is_no_fault_of_the_trial_ends_the_worker_and_queues_the_trial(
    tmp_path: Path, answer: Any, error: type[BaseException], why: str
) -> None:
    log = FakeTrackingLog()
    made = sweep(study(tmp_path), [samples.result(), answer], log)
    with pytest.raises(error):
        run_worker(made)
    assert log.told[-2:] == [("begin", 1, 1), ("kill", 1, 1)]
    assert why in log.why[0]
    assert states(made.study) == [("finished", 1, True), ("waiting", 2, False)]
    again_log = FakeTrackingLog()
    again = sweep(study(tmp_path), [], again_log)
    run_worker(again)
    assert again_log.told[:2] == [("begin", 1, 2), ("record", 1, 2)], "it is the next one"
    assert tried(again)[0] == tried(made)[1]
    assert len(again.study.trials()) == 4


# what the dead leave


def test_a_trial_of_a_dead_worker_is_tried_again_first(tmp_path: Path) -> None:
    dead, trial = abandoned(tmp_path)
    log = FakeTrackingLog()
    log.begin(trial)
    made = sweep(study(tmp_path), [], log)
    run_worker(made)
    assert log.told[1:4] == [("kill", 0, 1), ("begin", 0, 2), ("record", 0, 2)]
    assert log.why == ["worker dead died; the recipe is queued again"]
    assert tried(made)[0] == trial.params["bits"]
    assert not dead.finish(trial, samples.result()), "its late result is refused"


def test_a_trial_that_ends_every_worker_is_given_up_and_the_log_says_so(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    for n in range(MAX_ATTEMPTS):
        one = study(tmp_path, worker=f"w{n}")
        one.storage.register_worker(dead_member(f"w{n}"))
        trial = one.ask()
        assert trial is not None
        assert trial.number == 0
        log.begin(trial)
        if n < MAX_ATTEMPTS - 1:
            one.reclaim(dead_member(f"w{n}"))
    made = sweep(study(tmp_path), [], log)
    run_worker(made)
    assert states(made.study)[0] == ("failed", MAX_ATTEMPTS, True)
    assert "queued again" not in log.why[0]
    assert "failed" in log.why[0]
    assert log.left_open == set(), "runs of its earlier attempts are ended too"
    assert len(made.study.trials()) == 4


@pytest.mark.parametrize("told", [False, True], ids=["before record", "before annotate"])
def test_a_result_that_a_dead_worker_had_not_recorded_is_recorded_once(tmp_path: Path, told: bool) -> None:
    dead, trial = abandoned(tmp_path)
    dead.finish(trial, samples.result(decode_ms=0.25))
    log = FakeTrackingLog()
    log.begin(trial)
    if told:
        log.record(trial, samples.result(), set())
    made = sweep(study(tmp_path), [], log)
    run_worker(made)
    assert log.told.count(("record", 0, 1)) == 1 + told
    assert ("kill", 0, 1) not in log.told
    assert states(made.study)[0] == ("finished", 1, True)
    assert len(tried(made)) == 3
    log.told.clear()
    run_worker(sweep(study(tmp_path), [], log))
    assert log.told == [], "what is complete is not completed again"


def test_a_result_that_the_heir_did_not_learn_of_is_recorded_all_the_same(tmp_path: Path) -> None:
    """The answer to its burial was lost, or the heir could not record it at once."""
    dead, trial = abandoned(tmp_path)
    dead.finish(trial, samples.result())
    opened, log = study(tmp_path), FakeTrackingLog()
    real = type(opened.storage).reclaim
    opened.storage.reclaim = lambda *given, **named: real(opened.storage, *given, **named) and []  # type: ignore[method-assign,func-returns-value]
    run_worker(sweep(opened, [], log))
    assert ("record", 0, 1) in log.told
    assert opened.is_complete()


@pytest.mark.parametrize("gone", ["engine", "artifact"])
def test_a_result_whose_files_were_evicted_before_it_was_recorded_is_tried_again(tmp_path: Path, gone: str) -> None:
    dead, trial = abandoned(tmp_path)
    files: dict[str, Any] = {"engine": {"directory": str(tmp_path / "e"), "digest": "", "size_bytes": 1}}
    if gone == "artifact":
        files = {"artifacts": {"logs": str(tmp_path / "logs")}}
    dead.finish(trial, replace(samples.result(), **files))
    log = FakeTrackingLog()
    log.begin(trial)
    made = sweep(study(tmp_path), [], log)
    run_worker(made)
    assert log.told[1:4] == [("kill", 0, 1), ("begin", 0, 2), ("record", 0, 2)]
    assert "evicted" in log.why[0]
    assert tried(made)[0] == trial.params["bits"]
    assert states(made.study)[0] == ("finished", 2, True)


def test_runs_whose_trial_is_not_at_work_are_ended(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    log.left_open = {(0, 1), (7, 2)}
    run_worker(sweep(study(tmp_path), [], log))
    assert sorted(log.told[:2]) == [("kill", 0, 1), ("kill", 7, 2)]


def test_a_run_that_another_worker_has_just_begun_is_left_alone(tmp_path: Path) -> None:
    """It begins between two looks: one at the runs, the other at the trials."""
    other = study(tmp_path, worker="other")

    class Busy(FakeTrackingLog):
        def open_attempts(self) -> set[tuple[int, int]]:
            trial = other.ask()
            if trial is not None:
                self.begin(trial)
                begun.append(trial)
            return super().open_attempts()

    log, begun = Busy(), list[Trial]()
    sweep(study(tmp_path), [], log).outbox.end_stale_runs()
    assert len(begun) == 1
    assert log.left_open == {(0, 1)}


# roles


def test_those_who_build_hand_over_to_those_who_measure(tmp_path: Path) -> None:
    log = FakeTrackingLog()
    measurer = sweep(study(tmp_path, built=True, trials=2), [], log, role="measure")

    def measured() -> None:
        """The measurer takes what was built, as another process would at this time."""
        trial = measurer.study.ask()
        assert trial is not None
        loop._run_trial(measurer, trial)

    class Patient(Study):
        def is_complete(self) -> bool:
            measured()
            return Study.is_complete(self)

    builder = sweep(study(tmp_path, built=False, trials=2), [samples.result(), FAILED], log, role="build")
    builder = replace(builder, study=with_class(builder.study, Patient))
    measurer.study.worker = "measurer"
    run_worker(builder)
    assert log.told == [("begin", 0, 1), ("begin", 1, 1), ("record", 1, 1), ("begin", 0, 1), ("record", 0, 1)]
    assert tried(measurer) == tried(builder)[:1], "what failed is not measured"
    assert states(builder.study) == [("finished", 1, True), ("failed", 1, True)]
    assert builder.study.trials()[0].worker == "measurer"


def with_class(opened: Study, kind: type[Study]) -> Study:
    return kind(
        storage=opened.storage,
        search=opened.search,
        objectives=opened.objectives,
        limits=opened.limits,
        worker=opened.worker,
        built=opened.built,
    )


# a worker that is taken for dead


def while_at_work(opened: Study, act: Callable[[], None]) -> Callable[[], TrialResult]:
    def answer() -> TrialResult:
        act()
        return samples.result(decode_ms=0.123)

    return answer


def test_a_worker_taken_for_dead_joins_again_and_its_late_result_is_refused(tmp_path: Path) -> None:
    opened, log, names = study(tmp_path), FakeTrackingLog(), list[str]()

    def buried_meanwhile() -> None:
        names.append(opened.worker)
        (member,) = opened.storage.active_workers()
        opened.storage.reclaim(
            member, new_owner="other", max_attempts=MAX_ATTEMPTS, summarize_failure=lambda _: TrialSummary()
        )

    made = sweep(opened, [while_at_work(opened, buried_meanwhile)], log)
    run_worker(made)
    assert opened.worker not in names, "it works under another name"
    assert log.told[:4] == [("begin", 0, 1), ("kill", 0, 1), ("begin", 0, 2), ("record", 0, 2)]
    assert "considered dead" in log.why[0]
    assert states(opened) == [("finished", 2, True)] + [("finished", 1, True)] * 3
    assert opened.load_result(0).metrics["latency/decode_p50_ms"] != 0.123
    assert opened.storage.active_workers() == []


def test_a_worker_of_other_code_does_not_join(tmp_path: Path) -> None:
    from edgeopt.errors import ConfigError
    from edgeopt.search.workers.heartbeat import create_worker_record

    opened = study(tmp_path)
    opened.storage.register_worker(replace(create_worker_record("all"), code="0+other"))
    with pytest.raises(ConfigError, match="0\\+other"):
        run_worker(sweep(study(tmp_path)))
    opened.storage.register_worker(replace(dead_member("w2"), code="0+other"))
    opened.storage.unregister_worker(opened.storage.active_workers()[0].worker)
    run_worker(sweep(study(tmp_path)))
    assert len(opened.trials()) == 4, "the dead of this host do not keep others out"


def test_a_trial_that_is_refused_while_it_is_evaluated_is_over(tmp_path: Path) -> None:
    refused = replace(samples.result(), refused=PREDICTION)
    made = sweep(study(tmp_path, trials=1), [refused])
    run_worker(made)
    assert [trial.state for trial in made.study.trials()] == ["refused", "finished"]
