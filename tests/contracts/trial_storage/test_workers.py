"""Contract of TrialStorage on every database: workers, heartbeats, and recovery from dead workers."""

from __future__ import annotations

import random

import pytest
from support import trial_storages
from support.trial_storages import (
    RESULT,
    SUMMARY,
    add_finished_trial,
    add_trial,
    open_study,
    read_trial,
    reclaim_worker,
    remote_worker,
)

from edgeopt.errors import ConfigError, StoreError
from edgeopt.search.storage.trial import ENDED_STATES
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.trial_summary import TrialSummary


def test_active_workers_are_registered_and_not_ended(storage: TrialStorage) -> None:
    first, second = remote_worker("first"), remote_worker("second", role="build")
    for worker in (first, second, first):  # a repeated call after a lost answer changes nothing
        storage.register_worker(worker)
    assert sorted(storage.active_workers(), key=lambda record: record.worker) == [first, second]
    storage.unregister_worker("first")
    assert storage.active_workers() == [second]
    assert not storage.beat("first"), "an ended worker is not alive"


def test_heartbeat_counts_without_changing_trials(storage: TrialStorage) -> None:
    for name in ("first", "second"):
        storage.register_worker(remote_worker(name))
    trials = storage.trials_since(0)
    assert [storage.beat("second") for _ in range(3)] == [True] * 3
    assert {record.worker: record.beat for record in storage.active_workers()} == {"first": 0, "second": 3}
    assert storage.trials_since(0) == trials
    assert not storage.beat("unknown")


def test_other_code_requires_dead_predecessors(storage: TrialStorage) -> None:
    storage.register_worker(remote_worker("old", code="1+a"))
    with pytest.raises(ConfigError, match=r"study 's' .* worker old runs 1\+a, this one runs 2\+b"):
        storage.register_worker(remote_worker("new", code="2+b"))
    assert [record.worker for record in storage.active_workers()] == ["old"]
    storage.register_worker(remote_worker("new", code="2+b"), dead={"old"})
    storage.unregister_worker("old")
    storage.register_worker(remote_worker("newer", code="2+b"))
    assert {record.worker for record in storage.active_workers()} == {"new", "newer"}


def test_trials_of_dead_worker_are_recovered(storage: TrialStorage) -> None:
    for name in ("w", "new owner"):
        storage.register_worker(remote_worker(name))
    unrecorded = add_finished_trial(storage, 0, "w")
    recorded = add_finished_trial(storage, 1, "w")
    storage.mark_recorded(recorded, run_id="r")
    of_others = add_finished_trial(storage, 2, "new owner")
    running = add_trial(storage, 3, "w")
    assert reclaim_worker(storage, "w") == [running]
    assert [record.worker for record in storage.active_workers()] == ["new owner"]
    assert (read_trial(storage, 3).state, read_trial(storage, 3).attempt) == ("waiting", 2)
    assert [read_trial(storage, trial.number).worker for trial in (unrecorded, recorded)] == ["new owner", "w"]
    assert read_trial(storage, 2) == of_others


def test_reclaimed_worker_cannot_change_its_trial(storage: TrialStorage) -> None:
    storage.register_worker(remote_worker("w"))
    trial = add_trial(storage, 0, "w")
    reclaim_worker(storage, "w")
    assert not storage.beat("w")
    assert not storage.finish(trial, "finished", SUMMARY, RESULT)
    assert not storage.release(trial)
    second_attempt = storage.claim("other") or pytest.fail("the trial waits")
    storage.mark_recorded(trial, run_id="late")
    assert read_trial(storage, 0) == second_attempt
    with pytest.raises(StoreError):
        storage.load_result(0)


def test_heartbeat_prevents_reclaiming(storage: TrialStorage) -> None:
    storage.register_worker(remote_worker("w"))
    add_trial(storage, 0, "w")
    (outdated,) = storage.active_workers()
    storage.beat("w")
    reclaimed = storage.reclaim(
        outdated, new_owner="new owner", max_attempts=3, summarize_failure=lambda _: TrialSummary()
    )
    assert reclaimed == []
    assert storage.beat("w")
    assert read_trial(storage, 0).state == "running"


def test_trial_fails_after_max_attempts(storage: TrialStorage) -> None:
    add_trial(storage, 0)
    for attempt in (1, 2, 3):
        storage.register_worker(remote_worker(f"w{attempt}"))
        trial = storage.claim(f"w{attempt}") or pytest.fail("the trial waits")
        assert trial.attempt == attempt
        reclaim_worker(storage, f"w{attempt}", max_attempts=3)
    failed = read_trial(storage, 0)
    assert (failed.state, failed.recorded, failed.summary) == ("failed", True, TrialSummary(failure="3 attempts"))
    assert failed.ended_s is not None
    storage.mark_recorded(trial, run_id="late")
    assert read_trial(storage, 0).recorded, "no worker records it any more"


def test_built_trial_survives_its_builder(storage: TrialStorage) -> None:
    storage.register_worker(remote_worker("builder"))
    storage.release(add_trial(storage, 0, "builder"), built=True)
    assert reclaim_worker(storage, "builder") == []
    trial = read_trial(storage, 0)
    assert (trial.state, trial.built, trial.attempt) == ("waiting", True, 1)


def test_killed_process_leaves_no_partial_change(url: str) -> None:
    storage, rng = open_study(url), random.Random(0)
    for n in range(3):
        trial_storages.kill_working_process(url, f"w{n}", rng.uniform(0.05, 0.3))
        trials = storage.trials_since(0)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        for trial in trials:
            assert (trial.summary is not None) == (trial.state in ENDED_STATES)
            if trial.state == "finished":  # a released trial has no result
                assert storage.load_result(trial.number)["number"] == trial.number
            else:
                with pytest.raises(StoreError):
                    storage.load_result(trial.number)
        reclaim_worker(storage, f"w{n}")
        assert not [trial for trial in storage.trials_since(0) if trial.state == "running"]
    assert len(trials) > 10
