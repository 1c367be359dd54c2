"""A tracking server that fails costs no trial and no work: the ledger keeps what it is to know."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.studies import FAILED, FakeTrackingLog, dead_member, finish, study, sweep

from edgeopt.cache import StageCache
from edgeopt.core.result import TrialResult
from edgeopt.errors import TrackingError, UnreachableError
from edgeopt.search.status import collect_status
from edgeopt.search.storage.trial import Trial
from edgeopt.search.study import Study
from edgeopt.search.workers import loop
from edgeopt.search.workers import tracking_outbox as deliveries
from edgeopt.search.workers.loop import run_worker, sync_tracking
from edgeopt.search.workers.tracking_outbox import FIRST_PAUSE_S, LONGEST_PAUSE_S, TrackingOutbox


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POLL_S", 0.01)
    monkeypatch.setattr(deliveries, "FIRST_PAUSE_S", 0.0)


class Flaky(FakeTrackingLog):
    """A log whose server does not answer to the calls that are numbered, from 0; it is silent at all `from_` one."""

    def __init__(self, *silent: int, from_: int = 10**9) -> None:
        super().__init__()
        self.silent, self.from_, self.calls = set(silent), from_, 0

    def _ask(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if number in self.silent or number >= self.from_:
            raise UnreachableError("MLflow does not answer", location="http://server")

    def begin(self, trial: Trial) -> str:
        self._ask()
        return super().begin(trial)

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        self._ask()
        return super().record(trial, result, front)

    def kill(self, number: int, attempt: int, why: str) -> None:
        self._ask()
        super().kill(number, attempt, why)

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        self._ask()
        super().progress(values, step, at_s)

    def open_attempts(self) -> set[tuple[int, int]]:
        self._ask()
        return super().open_attempts()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def recorded(log: FakeTrackingLog) -> list[int]:
    return [told[1] for told in log.told if told[0] == "record"]


@pytest.mark.parametrize("silent", range(18))
def test_whatever_the_server_missed_is_told_later_in_order_and_once(tmp_path: Path, silent: int) -> None:
    log = Flaky(silent, silent + 1, silent + 2)
    made = sweep(study(tmp_path), [samples.result(), FAILED], log)
    made = replace(made, patience_s=60.0)
    run_worker(made)
    assert [trial.recorded for trial in made.study.trials()] == [True] * 4
    assert list(dict.fromkeys(recorded(log))) == [0, 1, 2, 3], "in the order in which they ended"
    assert log.left_open == set()
    steps = dict(log.progressed)
    assert {step: values["trials/finished"] for step, values in steps.items() if step > 1} == {2: 1.0, 3: 2.0, 4: 3.0}


def test_a_figure_that_is_told_late_is_the_one_of_its_time(tmp_path: Path) -> None:
    at_once, late = FakeTrackingLog(), Flaky(*range(3, 12))
    for log in (at_once, late):
        made = sweep(study(tmp_path / type(log).__name__), [samples.result(), FAILED], log)
        made = replace(made, patience_s=60.0)
        run_worker(made)
    assert [(s, v["trials/finished"], v["progress/front"]) for s, v in dict(late.progressed).items()] == [
        (s, v["trials/finished"], v["progress/front"]) for s, v in at_once.progressed
    ]


def test_a_server_that_stays_away_ends_the_worker_when_nothing_else_is_left_and_loses_nothing(tmp_path: Path) -> None:
    made = sweep(study(tmp_path, lease_s=0.3), [], Flaky(from_=3))
    with pytest.raises(TrackingError, match=r"trials are stored locally and not in MLflow yet.*edgeopt sync s"):
        run_worker(made)
    trials = made.study.trials()
    assert [trial.state for trial in trials] == ["finished"] * 4, "the sweep went on to its end"
    assert collect_status(made.study)["unrecorded"] == sum(not trial.recorded for trial in trials) > 0
    told = made.watcher.lines  # type: ignore[attr-defined]
    assert len(told) == 1, "a silence is told once"
    assert "http://server: MLflow does not answer" in told[0]

    log = FakeTrackingLog()
    again = study(tmp_path, lease_s=0.3)
    sync_tracking(again, log, print)
    assert recorded(log) == [trial.number for trial in trials if not trial.recorded]
    assert again.is_complete()
    assert again.storage.active_workers() == []
    log.told.clear()
    sync_tracking(again, log, print)
    assert log.told == [], "what was sent is not sent again"


def test_a_server_that_refuses_one_trial_gets_the_others(tmp_path: Path) -> None:
    class Picky(FakeTrackingLog):
        def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
            if trial.number == 1:
                raise TrackingError("MLflow refused: a name that it does not like")
            return super().record(trial, result, front)

    log = Picky()
    made = sweep(study(tmp_path), [], log)
    with pytest.raises(TrackingError, match=r"1 trials are stored locally and not in MLflow yet.*it does not like"):
        run_worker(made)
    assert [trial.recorded for trial in made.study.trials()] == [True, False, True, True]


def test_a_server_that_failed_is_left_alone_for_longer_and_longer(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.undo()
    opened, clock, log = study(tmp_path), Clock(), Flaky(from_=0)
    delivery = TrackingOutbox(opened, log, lambda _: None, clock=clock)
    finish(opened)
    asked = []
    while clock.now_s < 300:
        before = log.calls
        assert delivery.flush() == []
        if log.calls > before:
            asked.append(clock.now_s)
        clock.now_s += 1.0
    pauses = [b - a for a, b in itertools.pairwise(asked)]
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {LONGEST_PAUSE_S}
    log.from_ = 10**9
    clock.now_s += LONGEST_PAUSE_S
    assert delivery.flush() == [0]


def test_patience_begins_when_the_server_was_lost(tmp_path: Path) -> None:
    opened, clock = study(tmp_path), Clock()
    delivery = TrackingOutbox(opened, Flaky(from_=0), lambda _: None, clock=clock)
    delivery.raise_if_failing(0.0)
    finish(opened)
    delivery.flush()
    clock.now_s = 599.0
    delivery.flush()
    delivery.raise_if_failing(600.0)
    clock.now_s = 600.0
    with pytest.raises(TrackingError):
        delivery.raise_if_failing(600.0)


def kept(store: StageCache) -> tuple[Path, TrialResult]:
    folder = store.get_or_create_stage("engine", "one", lambda d: (d / "weights").write_text("w") and None).folder  # type: ignore[func-returns-value]
    described = {"directory": str(folder), "digest": "d", "size_bytes": 1}
    return folder, replace(samples.result(), engine=described)


def test_what_waits_to_be_sent_is_not_evicted(tmp_path: Path) -> None:
    from edgeopt.cache.eviction import evict

    store = StageCache(tmp_path / "cache", limit_bytes=10**9)
    folder, result = kept(store)
    opened = study(tmp_path)
    finish(opened, result)
    log = Flaky(0)
    delivery = TrackingOutbox(opened, log, lambda _: None)
    assert delivery.flush() == []
    evict(tmp_path / "cache", 0)
    assert folder.is_dir()
    assert delivery.flush() == [0]
    evict(tmp_path / "cache", 0)
    assert not folder.is_dir()


def test_a_living_worker_sends_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = study(tmp_path, lease_s=0.2, worker="alive")
    trial = finish(opened)
    opened.storage.register_worker(replace(dead_member("alive"), host="elsewhere"))
    monkeypatch.setattr(loop, "recover_orphans", beating(opened, loop.recover_orphans))
    log = FakeTrackingLog()
    sync_tracking(study(tmp_path, lease_s=0.2), log, print)
    assert recorded(log) == []
    assert [r.number for r in opened.unrecorded()] == [trial.number]


def beating(opened: Study, recover_orphans: Any) -> Any:
    def also(*given: Any) -> None:
        opened.storage.beat("alive")
        recover_orphans(*given)

    return also
