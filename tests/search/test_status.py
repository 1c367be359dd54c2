from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import samples
from support.studies import DECODE, FAILED, LIMITS, RATIO, RSS, by_bits, dead_member, finish, recorded, study

from edgeopt.core.target import Limit
from edgeopt.search.status import collect_status


def timed(seconds: float, *, saved: float = 0.0, **more: float) -> samples.TrialResult:
    return replace(samples.result(**more), timings_s={"all": seconds}, saved_s={"build": saved} if saved else {})


def test_a_study_that_has_not_begun_says_so(tmp_path: Path) -> None:
    told = collect_status(study(tmp_path, enqueue=({"bits": 4},)))
    assert told["study"] == "s"
    assert told["over"] == ""
    assert told["trials"] == {"waiting": 1}
    assert told["budget"] == 4
    assert (told["feasible"], told["front"], told["hypervolume"]) == (0, 0, 0.0)
    assert (told["spent_s"], told["spent_j"], told["left_s"]) == (0, 0, None)
    assert told["workers"] == []
    assert told["attempts_lost"] == 0


def test_workers_are_shown_with_what_they_do(tmp_path: Path) -> None:
    opened = study(tmp_path)
    for name in ("w", "idle"):
        opened.storage.register_worker(replace(dead_member(name), role="measure"))
    trial = opened.ask()
    assert trial is not None
    told = collect_status(opened)
    shown = {w["worker"]: w for w in told["workers"]}
    assert shown["w"] == {"worker": "w", "role": "measure", "trial": trial.number}
    assert shown["idle"]["trial"] is None
    assert told["trials"] == {"running": 1}


def test_states_rungs_and_broken_limits_are_counted(tmp_path: Path) -> None:
    narrow = Limit(metric=RSS, unit="MiB", absolute=80.0)
    opened = study(tmp_path, (*LIMITS[:2], narrow), predict_trial=by_bits, trials=4, enqueue=({"bits": 32},))
    assert (opened.ask() or pytest.fail("it is told")).state == "refused"
    finish(opened, samples.result())
    finish(opened, samples.result(decode_ms=9.0, ratio=9.0))
    finish(opened, replace(samples.result(ratio=9.0), refused="quality"))
    told = collect_status(opened)
    assert told["trials"] == {"refused": 1, "finished": 2, "stopped": 1}
    assert told["rungs"] == {"prediction": 1, "quality": 1}
    assert told["broken_limits"] == {RSS: 1, DECODE: 1, RATIO: 2}
    assert (told["feasible"], told["front"]) == (1, 1)


def test_what_was_spent_is_that_of_all_trials(tmp_path: Path) -> None:
    opened = study(tmp_path)
    finish(opened, replace(timed(10.0), energy_j=5.0))
    finish(opened, replace(timed(2.0, failure=FAILED), energy_j=1.0))
    told = collect_status(opened)
    assert (told["spent_s"], told["spent_j"]) == (12.0, 6.0)
    assert told["left_s"] == pytest.approx(2 * 6.0), "two trials are left, which take as long as those before"


def test_workers_share_what_is_left(tmp_path: Path) -> None:
    opened = study(tmp_path)
    finish(opened, timed(10.0))
    for name in ("a", "b", "c"):
        opened.storage.register_worker(dead_member(name))
    assert collect_status(opened)["left_s"] == pytest.approx(10.0)


def test_what_was_saved_is_told_by_its_cause(tmp_path: Path) -> None:
    narrow = (Limit(metric=RSS, unit="MiB", absolute=80.0),)
    opened = study(tmp_path, narrow, predict_trial=by_bits, trials=3, enqueue=({"bits": 32},))
    opened.ask()
    finish(opened, timed(10.0))
    finish(opened, timed(6.0, saved=6.0))
    finish(opened, replace(timed(3.0), refused="quality"))
    saved = collect_status(opened)["saved_s"]
    usual = 11.0  # the median of 10 and 12 that whole trials take
    assert saved == pytest.approx({"prediction": usual, "rungs": usual - 3.0, "cache": 6.0})


def test_a_study_that_is_over_says_why_and_has_nothing_left(tmp_path: Path) -> None:
    opened = study(tmp_path, trials=1)
    recorded(opened, finish(opened))
    told = collect_status(opened)
    assert told["over"] == "budget of 1 trials reached"
    assert told["left_s"] is None
    assert opened.hypervolume_history() == [told["hypervolume"]]
    assert 0 < told["hypervolume"] <= 1


def test_lost_attempts_are_counted(tmp_path: Path) -> None:
    opened = study(tmp_path)
    for _ in range(2):
        opened.storage.release(opened.ask() or pytest.fail("it waits"))
    assert collect_status(opened)["attempts_lost"] == 2


def test_the_document_is_plain_data(tmp_path: Path) -> None:
    opened = study(tmp_path)
    finish(opened)
    told = collect_status(opened)
    assert json.loads(json.dumps(told)) == told
