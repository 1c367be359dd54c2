from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import samples
from support.studies import (
    DECODE,
    FAILED,
    LIMITS,
    RATIO,
    RSS,
    dead_worker,
    finish_next,
    mark_recorded,
    open_study,
    predict_by_bits,
)

from edgeopt.core.target import Limit
from edgeopt.search.status import WorkerStatus, collect_status


def timed_result(seconds: float, *, saved: float = 0.0, **fields: float) -> samples.TrialResult:
    return replace(samples.result(**fields), timings_s={"all": seconds}, saved_s={"build": saved} if saved else {})


def test_new_study_has_waiting_trials_only(tmp_path: Path) -> None:
    status = collect_status(open_study(tmp_path, enqueue=({"bits": 4},)))
    assert status.study == "s"
    assert status.stop_reason == ""
    assert status.trials == {"waiting": 1}
    assert status.budget == 4
    assert (status.feasible, status.front, status.hypervolume) == (0, 0, 0.0)
    assert (status.spent_s, status.spent_j, status.remaining_s) == (0, 0, None)
    assert status.workers == ()
    assert status.lost_attempts == 0


def test_workers_show_their_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for name in ("w", "idle"):
        study.storage.register_worker(replace(dead_worker(name), role="measure"))
    trial = study.ask()
    assert trial is not None
    status = collect_status(study)
    workers = {worker.worker: worker for worker in status.workers}
    assert workers["w"] == WorkerStatus(worker="w", role="measure", trial=trial.number)
    assert workers["idle"].trial is None
    assert status.trials == {"running": 1}


def test_states_rungs_and_exceeded_limits_are_counted(tmp_path: Path) -> None:
    narrow = Limit(metric=RSS, unit="MiB", absolute=80.0)
    study = open_study(
        tmp_path, (*LIMITS[:2], narrow), predict_trial=predict_by_bits, trials=4, enqueue=({"bits": 32},)
    )
    assert (study.ask() or pytest.fail("a trial is due")).state == "refused"
    finish_next(study, samples.result())
    finish_next(study, samples.result(decode_ms=9.0, ratio=9.0))
    finish_next(study, replace(samples.result(ratio=9.0), refused="quality"))
    status = collect_status(study)
    assert status.trials == {"refused": 1, "finished": 2, "stopped": 1}
    assert status.outcomes == {
        "on the front": 1,
        "infeasible": 1,
        "refused by prediction": 1,
        "stopped early": 1,
    }
    assert status.rungs == {"prediction": 1, "quality": 1}
    assert status.exceeded_limits == {RSS: 1, DECODE: 1, RATIO: 2}
    assert (status.feasible, status.front) == (1, 1)


def test_spent_time_and_energy_are_totals(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    finish_next(study, replace(timed_result(10.0), energy_j=5.0))
    finish_next(study, replace(timed_result(2.0, failure=FAILED), energy_j=1.0))
    status = collect_status(study)
    assert (status.spent_s, status.spent_j) == (12.0, 6.0)
    assert status.remaining_s == pytest.approx(2 * 6.0), "two trials remain"


def test_remaining_time_is_divided_by_workers(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    finish_next(study, timed_result(10.0))
    for name in ("a", "b", "c"):
        study.storage.register_worker(dead_worker(name))
    assert collect_status(study).remaining_s == pytest.approx(10.0)


def test_saved_time_is_reported_by_source(tmp_path: Path) -> None:
    narrow = (Limit(metric=RSS, unit="MiB", absolute=80.0),)
    study = open_study(tmp_path, narrow, predict_trial=predict_by_bits, trials=3, enqueue=({"bits": 32},))
    study.ask()
    finish_next(study, timed_result(10.0))
    finish_next(study, timed_result(6.0, saved=6.0))
    finish_next(study, replace(timed_result(3.0), refused="quality"))
    saved = collect_status(study).saved_s
    median_s = 11.0  # of the complete trials, which take 10 and 12 seconds
    assert saved == pytest.approx({"prediction": median_s, "rungs": median_s - 3.0, "cache": 6.0})


def test_ended_study_names_its_reason(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=1)
    mark_recorded(study, finish_next(study))
    status = collect_status(study)
    assert status.stop_reason == "budget of 1 trials reached"
    assert status.remaining_s is None
    assert study.hypervolume_history() == [status.hypervolume]
    assert 0 < status.hypervolume <= 1


def test_lost_attempts_are_counted(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(2):
        study.storage.release(study.ask() or pytest.fail("a trial waits"))
    assert collect_status(study).lost_attempts == 2


def test_status_is_plain_json(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    finish_next(study)
    status = collect_status(study)
    assert json.loads(json.dumps(status.to_json())) == status.to_json() | {"workers": []}
