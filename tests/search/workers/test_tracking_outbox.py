"""Failures of the tracking server lose no trial and stop no evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.studies import FAILED, FakeTrackingLog, dead_worker, finish_next, open_study, worker_context

from edgeopt.cache import StageCache
from edgeopt.core.result import TrialResult
from edgeopt.errors import TrackingError, UnreachableError
from edgeopt.search.status import collect_status
from edgeopt.search.storage.trial import Trial
from edgeopt.search.study import Study
from edgeopt.search.workers import loop, tracking_outbox
from edgeopt.search.workers.loop import run_worker, sync_tracking
from edgeopt.search.workers.tracking_outbox import FIRST_PAUSE_S, LONGEST_PAUSE_S, TrackingOutbox


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POLL_S", 0.01)
    monkeypatch.setattr(tracking_outbox, "FIRST_PAUSE_S", 0.0)


class FlakyTrackingLog(FakeTrackingLog):
    """Tracking log that fails at the calls with the given indices, and at all calls from index `from_` on."""

    def __init__(self, *failing: int, from_: int = 10**9) -> None:
        super().__init__()
        self.failing, self.from_, self.call_count = set(failing), from_, 0

    def _count_call(self) -> None:
        index, self.call_count = self.call_count, self.call_count + 1
        if index in self.failing or index >= self.from_:
            raise UnreachableError("MLflow does not answer", location="http://server")

    def begin(self, trial: Trial) -> str:
        self._count_call()
        return super().begin(trial)

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        self._count_call()
        return super().record(trial, result, front)

    def kill(self, number: int, attempt: int, reason: str) -> None:
        self._count_call()
        super().kill(number, attempt, reason)

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        self._count_call()
        super().progress(values, step, at_s)

    def open_attempts(self) -> set[tuple[int, int]]:
        self._count_call()
        return super().open_attempts()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def recorded_numbers(log: FakeTrackingLog) -> list[int]:
    return [call[1] for call in log.calls if call[0] == "record"]


@pytest.mark.parametrize("first_failure", range(18))
def test_missed_calls_are_repeated_in_order(tmp_path: Path, first_failure: int) -> None:
    log = FlakyTrackingLog(first_failure, first_failure + 1, first_failure + 2)
    context = worker_context(open_study(tmp_path), [samples.result(), FAILED], log)
    context = replace(context, patience_s=60.0)
    run_worker(context)
    assert [trial.recorded for trial in context.study.trials()] == [True] * 4
    assert list(dict.fromkeys(recorded_numbers(log))) == [0, 1, 2, 3], "in the order of their ends"
    assert log.open_runs == set()
    steps = dict(log.logged_progress)
    assert {step: values["trials/finished"] for step, values in steps.items() if step > 1} == {2: 1.0, 3: 2.0, 4: 3.0}


def test_late_progress_has_the_values_of_its_time(tmp_path: Path) -> None:
    prompt, late = FakeTrackingLog(), FlakyTrackingLog(*range(3, 12))
    for log in (prompt, late):
        context = worker_context(open_study(tmp_path / type(log).__name__), [samples.result(), FAILED], log)
        context = replace(context, patience_s=60.0)
        run_worker(context)
    assert [(s, v["trials/finished"], v["progress/front"]) for s, v in dict(late.logged_progress).items()] == [
        (s, v["trials/finished"], v["progress/front"]) for s, v in prompt.logged_progress
    ]


def test_worker_stops_cleanly_when_server_stays_down(tmp_path: Path) -> None:
    context = worker_context(open_study(tmp_path, lease_s=0.3), [], FlakyTrackingLog(from_=3))
    with pytest.raises(TrackingError, match=r"trials are stored locally and not in MLflow yet.*edgeopt sync s"):
        run_worker(context)
    trials = context.study.trials()
    assert [trial.state for trial in trials] == ["finished"] * 4, "the sweep continued to its end"
    assert collect_status(context.study).unrecorded == sum(not trial.recorded for trial in trials) > 0
    messages = context.watcher.messages  # type: ignore[attr-defined]
    assert len(messages) == 1, "a failure is reported once"
    assert "http://server: MLflow does not answer" in messages[0]

    log = FakeTrackingLog()
    resumed = open_study(tmp_path, lease_s=0.3)
    sync_tracking(resumed, log, print)
    assert recorded_numbers(log) == [trial.number for trial in trials if not trial.recorded]
    assert resumed.is_complete()
    assert resumed.storage.active_workers() == []
    log.calls.clear()
    sync_tracking(resumed, log, print)
    assert log.calls == [], "recorded results are not recorded again"


def test_rejected_trial_does_not_block_the_others(tmp_path: Path) -> None:
    class RejectingTrackingLog(FakeTrackingLog):
        def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
            if trial.number == 1:
                raise TrackingError("MLflow rejected the request: invalid name")
            return super().record(trial, result, front)

    log = RejectingTrackingLog()
    context = worker_context(open_study(tmp_path), [], log)
    with pytest.raises(TrackingError, match=r"1 trials are stored locally and not in MLflow yet.*invalid name"):
        run_worker(context)
    assert [trial.recorded for trial in context.study.trials()] == [True, False, True, True]


def test_pauses_between_retries_double(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.undo()
    study, clock, log = open_study(tmp_path), Clock(), FlakyTrackingLog(from_=0)
    outbox = TrackingOutbox(study, log, lambda _: None, clock=clock)
    finish_next(study)
    call_times = []
    while clock.now_s < 300:
        before = log.call_count
        assert outbox.flush() == []
        if log.call_count > before:
            call_times.append(clock.now_s)
        clock.now_s += 1.0
    pauses = [b - a for a, b in itertools.pairwise(call_times)]
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {LONGEST_PAUSE_S}
    log.from_ = 10**9
    clock.now_s += LONGEST_PAUSE_S
    assert outbox.flush() == [0]


def test_patience_starts_at_the_first_failure(tmp_path: Path) -> None:
    study, clock = open_study(tmp_path), Clock()
    outbox = TrackingOutbox(study, FlakyTrackingLog(from_=0), lambda _: None, clock=clock)
    outbox.raise_if_failing(0.0)
    finish_next(study)
    outbox.flush()
    clock.now_s = 599.0
    outbox.flush()
    outbox.raise_if_failing(600.0)
    clock.now_s = 600.0
    with pytest.raises(TrackingError):
        outbox.raise_if_failing(600.0)


def cached_result(cache: StageCache) -> tuple[Path, TrialResult]:
    folder = cache.get_or_create_stage("engine", "one", lambda d: (d / "weights").write_text("w") and None).folder  # type: ignore[func-returns-value]
    engine = {"directory": str(folder), "digest": "d", "manifest_sha256": "m", "size_bytes": 1}
    return folder, replace(samples.result(), engine=engine)


def test_pending_result_is_not_evicted(tmp_path: Path) -> None:
    from edgeopt.cache.eviction import evict

    cache = StageCache(tmp_path / "cache", limit_bytes=10**9)
    folder, result = cached_result(cache)
    study = open_study(tmp_path)
    finish_next(study, result)
    log = FlakyTrackingLog(0)
    outbox = TrackingOutbox(study, log, lambda _: None)
    assert outbox.flush() == []
    evict(tmp_path / "cache", 0)
    assert folder.is_dir()
    assert outbox.flush() == [0]
    evict(tmp_path / "cache", 0)
    assert not folder.is_dir()


def test_sync_leaves_results_of_active_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path, lease_s=0.2, worker="alive")
    trial = finish_next(study)
    study.storage.register_worker(replace(dead_worker("alive"), host="elsewhere"))
    monkeypatch.setattr(loop, "recover_orphans", with_heartbeat(study, loop.recover_orphans))
    log = FakeTrackingLog()
    sync_tracking(open_study(tmp_path, lease_s=0.2), log, print)
    assert recorded_numbers(log) == []
    assert [r.number for r in study.unrecorded()] == [trial.number]


def with_heartbeat(study: Study, recover_orphans: Any) -> Any:
    def beat_and_recover(*args: Any) -> None:
        study.storage.beat("alive")
        recover_orphans(*args)

    return beat_and_recover
