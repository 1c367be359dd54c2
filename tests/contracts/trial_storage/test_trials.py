"""Contract of TrialStorage on every database: the life cycle of a trial with one worker."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from support.trial_storages import RESULT, SUMMARY, add_trial, read_trial

from edgeopt.errors import StoreError
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.trial_summary import TrialSummary, VerdictSummary


def test_added_trial_keeps_all_fields(storage: TrialStorage) -> None:
    params = {"recipe": "int4", "ratio": 0.1 + 0.2, "bits": 4, "on": True, "none": None, "list": [1, "ä"]}
    trial = storage.add(params, origin="enqueued", sampler_attrs={"generation": 3})
    assert trial == Trial(
        number=0,
        params=params,
        state="waiting",
        origin="enqueued",
        attempt=1,
        worker="",
        built=False,
        recorded=False,
        run_id="",
        ended_s=None,
        sampler_attrs={"generation": 3},
        summary=None,
        revision=1,
    )
    assert list(trial.params) == list(params), "parameters keep their order"
    assert storage.trials_since(0) == [trial]


@pytest.mark.parametrize("state", ["waiting", "running", "refused"])
def test_recipe_is_added_once(storage: TrialStorage, state: str) -> None:
    add_trial(storage, 1, "w", state=state)
    assert storage.add({"x": 1}, origin="spread") is None
    assert storage.add({"x": 1}, origin="sampled", worker="other", state="running") is None
    assert len(storage.trials_since(0)) == 1


@pytest.mark.parametrize("state", ["running", "refused"])
def test_repeated_add_returns_the_same_trial(storage: TrialStorage, state: str) -> None:
    first = add_trial(storage, 1, "w", state=state)
    repeated = add_trial(storage, 1, "w", state=state)
    assert repeated == first


def test_trial_is_added_with_result(storage: TrialStorage) -> None:
    before = time.time()
    trial = add_trial(storage, 1, "w", state="refused", summary=SUMMARY, result=RESULT)
    assert (trial.state, trial.summary) == ("refused", SUMMARY)
    assert trial.ended_s == pytest.approx(before, abs=60)
    assert storage.load_result(trial.number) == RESULT


def test_claims_follow_the_order_of_trials(storage: TrialStorage) -> None:
    for x in range(3):
        add_trial(storage, x)
    claimed = [storage.claim(f"w{n}") for n in range(4)]
    assert [trial and (trial.number, trial.worker, trial.state) for trial in claimed] == [
        (0, "w0", "running"),
        (1, "w1", "running"),
        (2, "w2", "running"),
        None,
    ]


def test_repeated_claim_returns_the_same_trial(storage: TrialStorage) -> None:
    add_trial(storage, 0), add_trial(storage, 1)
    first, repeated = storage.claim("w"), storage.claim("w")
    assert first is not None
    assert repeated is not None
    assert repeated.number == first.number
    assert [trial.state for trial in storage.trials_since(0)] == ["running", "waiting"]


def test_built_trial_waits_for_a_measuring_worker(storage: TrialStorage) -> None:
    trial = add_trial(storage, 0, "builder")
    add_trial(storage, 1)
    assert storage.release(trial, built=True)
    released = read_trial(storage, 0)
    assert (released.state, released.built, released.attempt) == ("waiting", True, 1), "the attempt continues"
    unbuilt, built = (storage.claim("builder", built=False), storage.claim("measurer", built=True))
    assert unbuilt is not None
    assert built is not None
    assert (unbuilt.number, built.number) == (1, 0)
    assert storage.claim("third", built=True) is None
    assert storage.claim("third") is None


def test_finished_trial_keeps_summary_and_result(storage: TrialStorage) -> None:
    before = time.time()
    trial = add_trial(storage, 0, "w")
    assert storage.finish(trial, "stopped", SUMMARY, RESULT)
    stored = read_trial(storage, 0)
    assert (stored.state, stored.summary, stored.recorded) == ("stopped", SUMMARY, False)
    assert stored.ended_s == pytest.approx(before, abs=60)
    assert storage.load_result(0) == RESULT


def test_repeated_finish_changes_nothing(storage: TrialStorage) -> None:
    trial = add_trial(storage, 0, "w")
    assert storage.finish(trial, "finished", SUMMARY, RESULT)
    first = read_trial(storage, 0)
    assert storage.finish(trial, "finished", TrialSummary(), {})
    assert read_trial(storage, 0) == first
    assert storage.load_result(0) == RESULT
    assert not storage.finish(trial, "failed", SUMMARY, RESULT), "the trial ended in another state"


def test_released_trial_waits_for_its_next_attempt(storage: TrialStorage) -> None:
    trial = add_trial(storage, 0, "w")
    assert storage.release(trial)
    stored = read_trial(storage, 0)
    assert (stored.state, stored.attempt, stored.run_id, stored.built) == ("waiting", 2, "", False)
    assert not storage.release(trial), "the worker no longer owns the trial"
    assert not storage.finish(trial, "finished", SUMMARY, RESULT)
    second_attempt = storage.claim("other")
    assert second_attempt is not None
    assert second_attempt.attempt == 2
    assert storage.finish(second_attempt, "finished", SUMMARY, RESULT)


def test_run_is_stored_for_an_ended_attempt_only(storage: TrialStorage) -> None:
    trial = add_trial(storage, 0, "w")
    storage.mark_recorded(trial, run_id="early")
    assert (read_trial(storage, 0).run_id, read_trial(storage, 0).recorded) == ("", False)
    storage.release(trial)
    second_attempt = storage.claim("w") or pytest.fail("the trial waits")
    storage.finish(second_attempt, "finished", SUMMARY, RESULT)
    storage.mark_recorded(trial, run_id="late")
    assert (read_trial(storage, 0).run_id, read_trial(storage, 0).recorded) == ("", False)
    storage.mark_recorded(second_attempt, run_id="r")
    assert (read_trial(storage, 0).run_id, read_trial(storage, 0).recorded) == ("r", True)


def test_discarded_result_queues_the_trial_again(storage: TrialStorage) -> None:
    trial = add_trial(storage, 0, "builder")
    storage.release(trial, built=True)
    trial = storage.claim("w", built=True) or pytest.fail("the trial waits")
    storage.finish(trial, "finished", SUMMARY, RESULT)
    storage.discard_result(trial)
    stored = read_trial(storage, 0)
    assert (stored.state, stored.attempt, stored.built, stored.summary, stored.ended_s) == (
        "waiting",
        2,
        False,
        None,
        None,
    )
    with pytest.raises(StoreError):
        storage.load_result(0)
    storage.discard_result(trial)
    assert read_trial(storage, 0) == stored, "a repeated call changes nothing"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 1e308])
def test_extreme_numbers_are_stored(storage: TrialStorage, value: float) -> None:
    verdicts = {"m": VerdictSummary(excess=value, satisfied=False, predicted=True, bound=None)}
    summary = TrialSummary(metrics={"m": value}, predicted={"m": value}, verdicts=verdicts, energy_j=value)
    trial = add_trial(storage, 0, "w")
    storage.finish(trial, "finished", summary, {"value": value})
    assert repr(read_trial(storage, 0).summary) == repr(summary)
    assert repr(storage.load_result(0)) == repr({"value": value})


def test_returned_trial_is_a_copy(storage: TrialStorage) -> None:
    trial = add_trial(storage, 0, "w")
    assert replace(trial) == trial
    trial.params["x"] = "altered"
    assert read_trial(storage, 0).params == {"x": 0}
