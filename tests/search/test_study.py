from __future__ import annotations

from collections.abc import Callable
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
    SIZE,
    dead_worker,
    finish_next,
    mark_recorded,
    open_study,
    predict_by_bits,
    prediction,
    run_search,
)

from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError
from edgeopt.search import study as study_module
from edgeopt.search.pareto.ranking import total_spent_j, total_spent_s
from edgeopt.search.prediction import PREDICTION
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.study import MAX_ATTEMPTS, Study, final_state


def bits(trials: list[Trial]) -> list[int]:
    return [trial.params["bits"] for trial in trials]


# proposals


def test_sessions_share_the_budget(tmp_path: Path) -> None:
    first = open_study(tmp_path)
    for n in (1, 2):
        finish_next(first, samples.result(decode_ms=0.1 * n))
    resumed = open_study(tmp_path)
    assert [trial.summary and trial.summary.metrics[DECODE] for trial in resumed.trials()] == [0.1, 0.2]
    finish_next(resumed)
    finish_next(resumed)
    assert resumed.ask() is None
    assert resumed.stop_reason() == "budget of 4 trials reached"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_finite_space_is_tried_completely(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, trials=50, sampler=sampler)
    run_search(study)
    assert sorted(bits(study.trials())) == [4, 8, 16, 32]
    assert study.stop_reason() == "", "the budget is not used up"
    assert study.is_complete()


def test_conditional_space_is_tried_completely(tmp_path: Path) -> None:
    parameters = {"recipe": {"choices": ["a", "b"]}, "x": {"low": 1, "high": 12, "when": {"recipe": "b"}}}
    study = open_study(tmp_path, trials=99, parameters=parameters, sampler="tpe")
    run_search(study)
    tried = [trial.params for trial in study.trials()]
    assert len(tried) == 13
    assert all(params in tried for params in [{"recipe": "a"}, *({"recipe": "b", "x": x} for x in range(1, 13))])


def test_failed_recipe_is_not_tried_again(tmp_path: Path) -> None:
    study = open_study(tmp_path, parameters={"bits": {"choices": [4, 8]}}, trials=9)
    finish_next(study, samples.result(failure=FAILED))
    finish_next(study)
    assert sorted(bits(study.trials())) == [4, 8]
    assert [trial.state for trial in study.trials()] == ["failed", "finished"]
    assert study.ask() is None


def test_enqueued_recipes_come_before_the_spread(tmp_path: Path) -> None:
    enqueued = ({"bits": 16}, {"bits": 8})
    for _ in range(2):
        study = open_study(tmp_path, enqueue=enqueued, predict_trial=predict_by_bits, spread=2, limits=())
    stored = [(trial.params["bits"], trial.origin) for trial in study.trials()]
    assert stored[:2] == [(16, "enqueued"), (8, "enqueued")]
    assert sorted(stored[2:]) == [(4, "spread"), (32, "spread")]
    assert bits(run_search(study))[:2] == [16, 8]


def test_enqueued_recipe_is_normalized(tmp_path: Path) -> None:
    parameters = {"x": {"low": 0.0, "high": 0.5, "step": 0.5}, "y": {"choices": [1, 2]}}
    study = open_study(tmp_path, parameters=parameters, enqueue=({"y": 1, "x": 0}, {"x": 0.5, "y": 2.0}), trials=9)
    run_search(study)
    assert [trial.params for trial in study.trials()][:2] == [{"x": 0.0, "y": 1}, {"x": 0.5, "y": 2}]
    assert len(study.trials()) == 4


@pytest.mark.parametrize(("trials", "spread"), [(3, 2), (2, 1), (1, 0)])
def test_spread_leaves_budget_for_enqueued_recipes(tmp_path: Path, trials: int, spread: int) -> None:
    study = open_study(
        tmp_path, trials=trials, spread=9, enqueue=({"bits": 8},), predict_trial=predict_by_bits, limits=()
    )
    assert sum(trial.origin == "spread" for trial in study.trials()) == spread


def test_trials_of_other_workers_use_the_budget(tmp_path: Path) -> None:
    workers = [open_study(tmp_path, worker=f"w{n}", trials=3) for n in range(4)]
    asked = [worker.ask() for worker in workers]
    assert [trial is None for trial in asked] == [False, False, False, True]
    assert len({trial.params["bits"] for trial in asked if trial}) == 3


# refusal by prediction


NARROW = (Limit(metric=RSS, unit="MiB", absolute=60.0),)
"""A limit that 16 and 32 bits exceed."""
WITHIN_NARROW = replace(samples.result(), verdicts=(replace(samples.result().verdicts[2], bound=60.0, satisfied=True),))


def test_refused_recipe_uses_no_budget(tmp_path: Path) -> None:
    study = open_study(tmp_path, limits=NARROW, predict_trial=predict_by_bits, trials=2)
    asked = run_search(study, lambda _: WITHIN_NARROW)
    states = {trial.params["bits"]: trial.state for trial in study.trials()}
    assert (states.pop(4), states.pop(8)) == ("finished", "finished"), "both recipes within the limit were evaluated"
    assert set(states.values()) == {"refused"}
    assert study.stop_reason() == "budget of 2 trials reached"
    for trial in (trial for trial in asked if trial.state == "refused"):
        assert trial.summary is not None
        assert trial.summary.refused == PREDICTION
        assert trial.summary.verdicts[RSS].excess == pytest.approx((50 + trial.params["bits"]) / 60 - 1)
        assert trial.summary.verdicts[RSS].predicted
        result = study.load_result(trial.number)
        assert final_state(result) == "refused"
        assert TrialSummary.from_result(result) == trial.summary
        assert result.verdicts[0].reason.startswith("is predicted to be")


def test_enqueued_recipe_is_refused_when_claimed(tmp_path: Path) -> None:
    study = open_study(
        tmp_path, limits=NARROW, predict_trial=predict_by_bits, enqueue=({"bits": 32}, {"bits": 4}), trials=2
    )
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    assert (first.state, first.origin, first.params) == ("refused", "enqueued", {"bits": 32})
    assert study.load_result(first.number).refused == PREDICTION
    assert (second.state, second.params) == ("running", {"bits": 4})


def test_unplannable_recipe_is_a_failed_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path, predict_trial=lambda _: prediction(failure=FAILED), trials=2)
    trial = study.ask()
    assert trial is not None
    assert trial.state == "failed"
    assert trial.summary is not None
    assert trial.summary.failure == "build: no"
    assert study.load_result(trial.number).failure == FAILED
    study.ask()
    assert study.stop_reason() == "budget of 2 trials reached", "failed trials count"


def test_relative_limit_refuses_once_baseline_is_measured(tmp_path: Path) -> None:
    relative = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    study = open_study(tmp_path, limits=relative, predict_trial=predict_by_bits, enqueue=({"bits": 4}, {"bits": 32}))
    finish_next(study, WITHIN_NARROW)
    resumed = open_study(tmp_path, limits=relative, predict_trial=predict_by_bits)
    trial = resumed.ask()
    assert trial is not None
    assert (trial.params["bits"], trial.state) == (32, "refused")
    assert trial.summary is not None
    assert trial.summary.verdicts[RSS].bound == 60.0


def test_search_stops_after_consecutive_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "MAX_CONSECUTIVE_REFUSALS", 5)
    parameters = {"bits": {"low": 20, "high": 4000}}
    study = open_study(tmp_path, limits=NARROW, predict_trial=predict_by_bits, parameters=parameters)
    asked = run_search(study)
    assert [trial.state for trial in asked] == ["refused"] * 5
    assert study.is_complete()


# attempts


def test_released_trial_is_next_and_uses_no_budget(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=1)
    trial = study.ask()
    assert trial is not None
    study.storage.release(trial)
    second_attempt = open_study(tmp_path, trials=1).ask()
    assert second_attempt is not None
    assert (second_attempt.number, second_attempt.params, second_attempt.attempt) == (trial.number, trial.params, 2)


def test_trial_fails_after_max_attempts(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=2)
    for n in range(MAX_ATTEMPTS):
        study.worker = f"w{n}"
        study.storage.register_worker(dead_worker(study.worker))
        trial = study.ask()
        assert trial is not None
        assert (trial.number, trial.attempt) == (0, n + 1)
        (lost,) = study.reclaim(study.storage.active_workers()[0])
        assert lost == trial
    (failed,) = study.trials()
    assert failed.state == "failed"
    assert failed.summary is not None
    assert failed.summary.failure == f"worker: the worker died in all {MAX_ATTEMPTS} attempts"
    assert failed.recorded
    following = study.ask()
    assert following is not None
    assert following.number == 1


def test_builder_leaves_built_trials_to_measurer(tmp_path: Path) -> None:
    builder = open_study(tmp_path, worker="b", built=False, trials=2)
    measurer = open_study(tmp_path, worker="m", built=True, trials=2)
    assert measurer.ask() is None, "nothing is built yet, and a measurer proposes nothing"
    for _ in range(2):
        trial = builder.ask()
        assert trial is not None
        assert builder.storage.release(trial, built=True)
    assert builder.ask() is None, "built trials use the budget"
    assert not builder.is_complete()
    assert [finish_next(measurer).number for _ in range(2)] == [0, 1]
    assert measurer.ask() is None


# end of the search


def test_search_ends_when_time_is_spent(tmp_path: Path) -> None:
    study = open_study(tmp_path, time="3 s")  # a trial takes 1.5 s
    finish_next(study)
    assert study.stop_reason() == ""
    finish_next(study)
    assert study.stop_reason() == "time budget of 3 s spent"
    assert total_spent_s(study.trials()) == 3.0
    assert study.ask() is None


def test_search_ends_when_energy_is_spent(tmp_path: Path) -> None:
    study = open_study(tmp_path, energy="1 kJ")
    finish_next(study, replace(samples.result(), energy_j=999.0))
    assert study.stop_reason() == ""
    finish_next(study, replace(samples.result(failure=FAILED), energy_j=1.0))
    assert study.stop_reason() == "energy budget of 1 kJ spent"
    assert total_spent_j(study.trials()) == 1000.0


def test_search_ends_when_front_stagnates(tmp_path: Path) -> None:
    study = open_study(tmp_path, stagnation=2)
    finish_next(study, samples.result(decode_ms=0.5, ratio=1.1))
    finish_next(study, samples.result(decode_ms=0.9, ratio=1.01))
    assert study.stop_reason() == ""
    finish_next(study, samples.result(decode_ms=0.95, ratio=1.12))
    assert study.stop_reason() == "", "one trial without growth is not enough"
    finish_next(study, samples.result(failure=FAILED))
    assert study.stop_reason() == "budget of 4 trials reached"
    longer = open_study(tmp_path, stagnation=2, trials=9)
    assert longer.stop_reason() == "no growth of the front for 2 trials"


def test_growth_with_a_constant_objective_is_not_stagnation(tmp_path: Path) -> None:
    study = open_study(tmp_path, (), stagnation=1, trials=9, objectives={SIZE: "minimize", DECODE: "minimize"})
    for decode_ms in (0.8, 0.4, 0.2):
        finish_next(study, samples.result(decode_ms=decode_ms))
        assert study.stop_reason() == ""


def test_waiting_trials_do_not_start_after_the_end(tmp_path: Path) -> None:
    study = open_study(tmp_path, enqueue=({"bits": 4}, {"bits": 8}), time="1 s")
    mark_recorded(study, finish_next(study))
    assert study.ask() is None
    assert study.is_complete()


def test_study_is_complete_once_all_trials_are_recorded(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=1)
    trial = study.ask()
    assert trial is not None
    assert not study.is_complete(), "the trial runs"
    study.finish(trial, samples.result())
    assert not study.is_complete(), "the trial is not recorded"
    assert study.open_attempts() == {(0, 1)}
    assert [r.number for r in study.unrecorded()] == [0]
    assert [r.number for r in open_study(tmp_path, worker="other").unrecorded()] == [0], "for every worker"
    mark_recorded(study, trial)
    assert study.is_complete()
    assert study.open_attempts() == set()


# definitions


CHANGED: dict[str, tuple[Callable[[Path], Study], str]] = {
    "objective": (
        lambda folder: open_study(folder, objectives={RATIO: "maximize", DECODE: "minimize"}),
        f"objective {RATIO}: stored minimize, new maximize",
    ),
    "limit": (
        lambda folder: open_study(folder, (*LIMITS[:2], Limit(metric=RSS, unit="MiB", absolute=80.0))),
        f"limit {RSS}: stored at most 90 MiB, new at most 80 MiB",
    ),
    "removed limit": (
        lambda folder: open_study(folder, limits=LIMITS[:2]),
        f"limit {RSS}: stored at most 90 MiB, new none",
    ),
    "parameter": (
        lambda folder: open_study(folder, parameters={"bits": {"choices": [4, 8]}}),
        'parameter bits: stored {"choices": [4, 8, 16, 32]}, new {"choices": [4, 8]}',
    ),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_changed_definition_is_rejected_with_both_values(tmp_path: Path, changed: str) -> None:
    open_study(tmp_path)
    reopen, difference = CHANGED[changed]
    with pytest.raises(ConfigError, match=r"search\.study=NAME") as caught:
        reopen(tmp_path)
    assert difference in str(caught.value)
    assert "already exists with another definition" in str(caught.value)


def test_budget_and_sampler_may_change(tmp_path: Path) -> None:
    finish_next(open_study(tmp_path))
    reopened = open_study(
        tmp_path, LIMITS[::-1], trials=9, sampler="tpe", seed=5, trial_timeout_s=1.0, time="1 h", refine=0.5
    )
    assert len(reopened.trials()) == 1
