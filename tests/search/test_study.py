from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.studies import DECODE, FAILED, LIMITS, RATIO, RSS, SIZE, by_bits, finish, forecast, recorded, search, study

from edgeopt.core.result import TrialResult
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError
from edgeopt.search import study as study_module
from edgeopt.search.pareto.ranking import total_spent_j, total_spent_s
from edgeopt.search.prediction import PREDICTION, Prediction
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.study import MAX_ATTEMPTS, Study, final_state

STOPPED = replace(samples.result(decode_ms=9.0), refused="quality")


def bits(trials: list[Trial]) -> list[int]:
    return [trial.params["bits"] for trial in trials]


def work_off(opened: Study, answer: Callable[[Trial], TrialResult] = lambda _: samples.result()) -> list[Trial]:
    """Ask, finish and record until there is nothing to ask for; the rows as they were asked."""
    asked = []
    while (trial := opened.ask()) is not None:
        asked.append(trial)
        if trial.state == "running":
            assert opened.finish(trial, answer(trial))
        recorded(opened, trial)
    return asked


# what is tried


def test_a_search_ends_with_its_budget_of_which_every_session_takes(tmp_path: Path) -> None:
    first = study(tmp_path)
    for n in (1, 2):
        finish(first, samples.result(decode_ms=0.1 * n))
    again = study(tmp_path)
    assert [trial.summary and trial.summary.metrics[DECODE] for trial in again.trials()] == [0.1, 0.2]
    finish(again)
    finish(again)
    assert again.ask() is None
    assert again.stop_reason() == "budget of 4 trials reached"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_finite_space_is_tried_whole_and_without_repeats(tmp_path: Path, sampler: str) -> None:
    opened = study(tmp_path, trials=50, sampler=sampler)
    work_off(opened)
    assert sorted(bits(opened.trials())) == [4, 8, 16, 32]
    assert opened.stop_reason() == "", "the budget is not spent"
    assert opened.is_complete()


def test_a_conditional_space_is_tried_whole(tmp_path: Path) -> None:
    parameters = {"recipe": {"choices": ["a", "b"]}, "x": {"low": 1, "high": 12, "when": {"recipe": "b"}}}
    opened = study(tmp_path, trials=99, parameters=parameters, sampler="tpe")
    work_off(opened)
    tried = [trial.params for trial in opened.trials()]
    assert len(tried) == 13
    assert all(params in tried for params in [{"recipe": "a"}, *({"recipe": "b", "x": x} for x in range(1, 13))])


def test_a_failed_recipe_is_not_tried_again(tmp_path: Path) -> None:
    opened = study(tmp_path, parameters={"bits": {"choices": [4, 8]}}, trials=9)
    finish(opened, samples.result(failure=FAILED))
    finish(opened)
    assert sorted(bits(opened.trials())) == [4, 8]
    assert [trial.state for trial in opened.trials()] == ["failed", "finished"]
    assert opened.ask() is None


def test_known_recipes_come_first_then_a_spread_and_both_once(tmp_path: Path) -> None:
    known = ({"bits": 16}, {"bits": 8})
    for _ in range(2):
        opened = study(tmp_path, enqueue=known, predict_trial=by_bits, spread=2, limits=())
    queued = [(trial.params["bits"], trial.origin) for trial in opened.trials()]
    assert queued[:2] == [(16, "enqueued"), (8, "enqueued")]
    assert sorted(queued[2:]) == [(4, "spread"), (32, "spread")]
    assert bits(work_off(opened))[:2] == [16, 8]


def test_a_known_recipe_is_one_of_the_space_however_it_is_written(tmp_path: Path) -> None:
    parameters = {"x": {"low": 0.0, "high": 0.5, "step": 0.5}, "y": {"choices": [1, 2]}}
    opened = study(tmp_path, parameters=parameters, enqueue=({"y": 1, "x": 0}, {"x": 0.5, "y": 2.0}), trials=9)
    work_off(opened)
    assert [trial.params for trial in opened.trials()][:2] == [{"x": 0.0, "y": 1}, {"x": 0.5, "y": 2}]
    assert len(opened.trials()) == 4


@pytest.mark.parametrize(("trials", "spread"), [(3, 2), (2, 1), (1, 0)])
def test_a_spread_leaves_the_budget_to_what_is_known(tmp_path: Path, trials: int, spread: int) -> None:
    opened = study(tmp_path, trials=trials, spread=9, enqueue=({"bits": 8},), predict_trial=by_bits, limits=())
    assert sum(trial.origin == "spread" for trial in opened.trials()) == spread


def test_trials_of_others_count_as_begun(tmp_path: Path) -> None:
    workers = [study(tmp_path, worker=f"w{n}", trials=3) for n in range(4)]
    asked = [worker.ask() for worker in workers]
    assert [trial is None for trial in asked] == [False, False, False, True]
    assert len({trial.params["bits"] for trial in asked if trial}) == 3


# what the estimate refuses


NARROW = (Limit(metric=RSS, unit="MiB", absolute=60.0),)
"""Which 16 and 32 bits do not keep."""
FITS = replace(samples.result(), verdicts=(replace(samples.result().verdicts[2], bound=60.0, satisfied=True),))


def test_what_the_estimate_refuses_costs_no_budget_and_is_over_with_its_reason(tmp_path: Path) -> None:
    opened = study(tmp_path, limits=NARROW, predict_trial=by_bits, trials=2)
    asked = work_off(opened, lambda _: FITS)
    states = {trial.params["bits"]: trial.state for trial in opened.trials()}
    assert (states.pop(4), states.pop(8)) == ("finished", "finished"), "both that fit were evaluated"
    assert set(states.values()) == {"refused"}
    assert opened.stop_reason() == "budget of 2 trials reached"
    for trial in (trial for trial in asked if trial.state == "refused"):
        assert trial.summary is not None
        assert trial.summary.refused == PREDICTION
        assert trial.summary.verdicts[RSS].excess == pytest.approx((50 + trial.params["bits"]) / 60 - 1)
        assert trial.summary.verdicts[RSS].predicted
        result = opened.load_result(trial.number)
        assert final_state(result) == "refused"
        assert TrialSummary.from_result(result) == trial.summary
        assert result.verdicts[0].reason.startswith("is predicted to be")


def test_a_known_recipe_is_refused_when_its_turn_comes(tmp_path: Path) -> None:
    opened = study(tmp_path, limits=NARROW, predict_trial=by_bits, enqueue=({"bits": 32}, {"bits": 4}), trials=2)
    first, second = opened.ask(), opened.ask()
    assert first is not None
    assert second is not None
    assert (first.state, first.origin, first.params) == ("refused", "enqueued", {"bits": 32})
    assert opened.load_result(first.number).refused == PREDICTION
    assert (second.state, second.params) == ("running", {"bits": 4})


def test_a_recipe_that_cannot_be_planned_is_a_failed_trial_of_its_own_words(tmp_path: Path) -> None:
    opened = study(tmp_path, predict_trial=lambda _: forecast(failure=FAILED), trials=2)
    trial = opened.ask()
    assert trial is not None
    assert trial.state == "failed"
    assert trial.summary is not None
    assert trial.summary.failure == "build: no"
    assert opened.load_result(trial.number).failure == FAILED
    opened.ask()
    assert opened.stop_reason() == "budget of 2 trials reached", "failed ones count"


def test_a_limit_relative_to_the_baseline_refuses_as_soon_as_it_was_measured(tmp_path: Path) -> None:
    relative = (Limit(metric=RSS, unit="MiB", baseline_factor=0.5),)
    opened = study(tmp_path, limits=relative, predict_trial=by_bits, enqueue=({"bits": 4}, {"bits": 32}))
    finish(opened, FITS)
    again = study(tmp_path, limits=relative, predict_trial=by_bits)
    trial = again.ask()
    assert trial is not None
    assert (trial.params["bits"], trial.state) == (32, "refused")
    assert trial.summary is not None
    assert trial.summary.verdicts[RSS].bound == 60.0


def test_a_search_that_finds_nothing_to_try_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "MAX_CONSECUTIVE_REFUSALS", 5)
    parameters = {"bits": {"low": 20, "high": 4000}}
    opened = study(tmp_path, limits=NARROW, predict_trial=by_bits, parameters=parameters)
    asked = work_off(opened)
    assert [trial.state for trial in asked] == ["refused"] * 5
    assert opened.is_complete()


# attempts


def test_a_trial_that_is_given_up_is_the_next_one_and_costs_no_budget(tmp_path: Path) -> None:
    opened = study(tmp_path, trials=1)
    trial = opened.ask()
    assert trial is not None
    opened.storage.release(trial)
    again = study(tmp_path, trials=1).ask()
    assert again is not None
    assert (again.number, again.params, again.attempt) == (trial.number, trial.params, 2)


def test_a_recipe_that_kills_its_worker_every_time_is_a_failed_trial(tmp_path: Path) -> None:
    from support.studies import dead_member

    opened = study(tmp_path, trials=2)
    for n in range(MAX_ATTEMPTS):
        opened.worker = f"w{n}"
        opened.storage.register_worker(dead_member(opened.worker))
        trial = opened.ask()
        assert trial is not None
        assert (trial.number, trial.attempt) == (0, n + 1)
        (lost,) = opened.reclaim(opened.storage.active_workers()[0])
        assert lost == trial
    (given_up,) = opened.trials()
    assert given_up.state == "failed"
    assert given_up.summary is not None
    assert given_up.summary.failure == f"worker: the worker died in all {MAX_ATTEMPTS} attempts"
    assert given_up.recorded
    follower = opened.ask()
    assert follower is not None
    assert follower.number == 1


def test_those_who_build_leave_built_trials_to_those_who_measure(tmp_path: Path) -> None:
    builder = study(tmp_path, worker="b", built=False, trials=2)
    measurer = study(tmp_path, worker="m", built=True, trials=2)
    assert measurer.ask() is None, "nothing is built yet, and it proposes nothing"
    for _ in range(2):
        trial = builder.ask()
        assert trial is not None
        assert builder.storage.release(trial, built=True)
    assert builder.ask() is None, "built trials take their place in the budget"
    assert not builder.is_complete()
    assert [finish(measurer).number for _ in range(2)] == [0, 1]
    assert measurer.ask() is None


# when it is over


def test_a_search_ends_when_its_time_is_spent(tmp_path: Path) -> None:
    opened = study(tmp_path, time="3 s")  # a trial takes 1.5 s
    finish(opened)
    assert opened.stop_reason() == ""
    finish(opened)
    assert opened.stop_reason() == "time budget of 3 s spent"
    assert total_spent_s(opened.trials()) == 3.0
    assert opened.ask() is None


def test_a_search_ends_when_its_energy_is_spent(tmp_path: Path) -> None:
    opened = study(tmp_path, energy="1 kJ")
    finish(opened, replace(samples.result(), energy_j=999.0))
    assert opened.stop_reason() == ""
    finish(opened, replace(samples.result(failure=FAILED), energy_j=1.0))
    assert opened.stop_reason() == "energy budget of 1 kJ spent"
    assert total_spent_j(opened.trials()) == 1000.0


def test_a_search_ends_when_its_front_grows_no_more(tmp_path: Path) -> None:
    opened = study(tmp_path, stagnation=2)
    finish(opened, samples.result(decode_ms=0.5, ratio=1.1))
    finish(opened, samples.result(decode_ms=0.9, ratio=1.01))
    assert opened.stop_reason() == ""
    finish(opened, samples.result(decode_ms=0.95, ratio=1.12))
    assert opened.stop_reason() == "", "one trial without growth is not two"
    finish(opened, samples.result(failure=FAILED))
    assert opened.stop_reason() == "budget of 4 trials reached"
    longer = study(tmp_path, stagnation=2, trials=9)
    assert longer.stop_reason() == "no growth of the front for 2 trials"


def test_a_growing_front_is_no_stagnation_where_one_objective_never_changes(tmp_path: Path) -> None:
    opened = study(tmp_path, (), stagnation=1, trials=9, objectives={SIZE: "minimize", DECODE: "minimize"})
    for decode_ms in (0.8, 0.4, 0.2):
        finish(opened, samples.result(decode_ms=decode_ms))
        assert opened.stop_reason() == ""


def test_what_waits_does_not_begin_when_it_is_over(tmp_path: Path) -> None:
    opened = study(tmp_path, enqueue=({"bits": 4}, {"bits": 8}), time="1 s")
    recorded(opened, finish(opened))
    assert opened.ask() is None
    assert opened.is_complete()


def test_a_study_is_settled_when_all_is_over_and_recorded(tmp_path: Path) -> None:
    opened = study(tmp_path, trials=1)
    trial = opened.ask()
    assert trial is not None
    assert not opened.is_complete(), "it runs"
    opened.finish(trial, samples.result())
    assert not opened.is_complete(), "it is not recorded"
    assert opened.open_attempts() == {(0, 1)}
    assert [r.number for r in opened.unrecorded()] == [0]
    assert [r.number for r in study(tmp_path, worker="other").unrecorded()] == [0], "whoever looks"
    recorded(opened, trial)
    assert opened.is_complete()
    assert opened.open_attempts() == set()


# what is best


def test_only_feasible_trials_are_ranked(tmp_path: Path) -> None:
    opened = study(tmp_path)
    good = finish(opened, samples.result(decode_ms=0.5))
    finish(opened, samples.result(decode_ms=0.1, ratio=9.0))
    finish(opened, samples.result(failure=FAILED))
    finish(opened, STOPPED)
    assert opened.ranks() == {good.number: 1}
    assert opened.front() == [good]
    assert [trial.state for trial in opened.trials()] == ["finished", "finished", "failed", "stopped"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_a_finished_trial_and_never_on_the_front(tmp_path: Path, value: float) -> None:
    whole = samples.result()
    broken = tuple(replace(m, value=value) if m.metric == DECODE else m for m in whole.measurements)
    opened = study(tmp_path, limits=())
    trial = finish(opened, replace(whole, measurements=broken, verdicts=()))
    assert trial.state == "finished"
    assert opened.ranks() == {}
    assert opened.hypervolume_history() == [0.0]
    assert opened.ask() is not None, "the search goes on"


def test_a_maximized_objective_grows_the_front_upwards(tmp_path: Path) -> None:
    opened = study(tmp_path, limits=(), objectives={SIZE: "minimize", DECODE: "maximize"})
    slow, fast = (finish(opened, samples.result(decode_ms=ms)) for ms in (0.2, 0.8))
    assert opened.ranks() == {slow.number: 2, fast.number: 1}
    first, second = opened.hypervolume_history()
    assert 0 < first < second <= 1


def test_volumes_follow_the_order_in_which_trials_ended(tmp_path: Path) -> None:
    one, other = study(tmp_path, worker="w1"), study(tmp_path, worker="w2")
    early, late = one.ask(), other.ask()
    assert early is not None
    assert late is not None
    other.finish(late, samples.result(decode_ms=0.9, ratio=1.1))
    one.finish(early, samples.result(failure=FAILED))
    finish(other, samples.result(decode_ms=0.2, ratio=1.0))
    volumes = one.hypervolume_history()
    assert 0 < volumes[0] == volumes[1] < volumes[2] <= 1


def test_later_trials_do_not_change_what_the_front_was_worth(tmp_path: Path) -> None:
    opened = study(tmp_path, limits=(), objectives={SIZE: "minimize", DECODE: "maximize", RATIO: "minimize"})
    known: list[float] = []
    for ms, ratio in ((0.2, 1.0), (0.001, 50.0), (0.8, 0.2), (0.4, 0.0)):
        finish(opened, samples.result(decode_ms=ms, ratio=ratio))
        volumes = opened.hypervolume_history()
        assert volumes[:-1] == known
        assert all(a <= b for a, b in itertools.pairwise(volumes))
        known = volumes


def test_the_front_is_worth_its_share_of_what_lies_within_the_limits(tmp_path: Path) -> None:
    opened = study(tmp_path, objectives={DECODE: "minimize", RATIO: "minimize"})
    finish(opened, samples.result(decode_ms=0.5, ratio=1.0))
    assert opened.hypervolume_history() == pytest.approx([(1 - 0.5 / 1.04) * (1 - 1.0 / 1.15)])


def test_a_rate_is_worth_the_more_the_higher_it_is(tmp_path: Path) -> None:
    opened = study(tmp_path, limits=(), objectives={DECODE: "maximize"})
    for rate in (0.2, 0.8):
        finish(opened, samples.result(decode_ms=rate))
    assert opened.hypervolume_history() == pytest.approx([1 - 1 / 2, 1 - 1 / 8])


# samplers


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random"])
def test_every_sampler_searches_under_constraints_with_whatever_comes_of_trials(tmp_path: Path, sampler: str) -> None:
    parameters = {
        "recipe": {"choices": ["a", "b"]},
        "bits": {"low": 1, "high": 400},
        "ratio": {"low": 0.0, "high": 1.0, "when": {"recipe": "b"}},
    }

    def predict_trial(params: Params) -> Prediction:
        if params["bits"] % 7 == 0:
            return forecast(failure=FAILED)
        return forecast(rss=200.0 if params["bits"] % 5 == 0 else 50.0)

    whole = samples.result()
    odd = tuple(replace(m, value=math.nan, high=math.nan) for m in whole.measurements)
    unproven = tuple(replace(v, excess=None, satisfied=False) for v in whole.verdicts)
    answers = itertools.cycle(
        [
            samples.result(),
            samples.result(failure=FAILED),
            samples.result(ratio=3.0),
            STOPPED,
            replace(whole, measurements=odd, verdicts=unproven),
            replace(whole, measurements=whole.measurements[:1], verdicts=whole.verdicts[:1]),
        ]
    )
    opened = study(tmp_path, sampler=sampler, parameters=parameters, predict_trial=predict_trial, trials=24)
    work_off(opened, lambda trial: next(answers))
    trials = opened.trials()
    assert sum(trial.state != "refused" for trial in trials) == 24
    assert {trial.state for trial in trials} >= {"finished", "stopped", "failed"}
    for trial in trials:
        opened.search.space.validate(trial.params)
    again = study(tmp_path, sampler=sampler, parameters=parameters, predict_trial=predict_trial, trials=25)
    assert work_off(again, lambda trial: next(answers)), "a resumed search goes on"


def test_a_resumed_search_does_not_propose_what_it_proposed(tmp_path: Path) -> None:
    parameters = {"x": {"low": 0.0, "high": 1.0}}
    one = study(tmp_path, parameters=parameters, trials=2)
    two = study(tmp_path / "other", parameters=parameters, trials=2)
    assert finish(one).params == finish(two).params, "the seed decides"
    again = study(tmp_path, parameters=parameters, trials=2)
    assert finish(again).params != one.trials()[0].params


def test_tpe_learns_where_limits_are_kept(tmp_path: Path) -> None:
    parameters = {"x": {"low": 0.0, "high": 1.0}}
    opened = study(tmp_path, sampler="tpe", parameters=parameters, trials=40)
    work_off(opened, lambda trial: samples.result(ratio=1.0 + abs(trial.params["x"] - 0.8)))
    late = [trial.params["x"] for trial in opened.trials()[20:]]
    assert sum(0.65 <= x <= 0.95 for x in late) > 0.6 * len(late), "chance alone would hit 0.3 of them"


# refinement


def test_at_last_untried_neighbours_of_the_front_are_tried(tmp_path: Path) -> None:
    parameters = {"bits": {"low": 1, "high": 64, "step": 1}}
    opened = study(tmp_path, (), parameters=parameters, predict_trial=by_bits, trials=8, refine=0.5)

    def answer(trial: Trial) -> TrialResult:
        result = samples.result(decode_ms=trial.params["bits"] / 10, ratio=1 + 1 / trial.params["bits"])
        return replace(result, verdicts=())

    asked = work_off(opened, answer)
    assert [trial.origin for trial in asked] == ["sampled"] * 4 + ["refined"] * 4
    for n, trial in enumerate(asked[4:], start=4):
        before = [r.params["bits"] for r in asked[:n]]
        step = max(63 / 10, 1)  # a range without wider steps is taken in tenths
        assert any(abs(trial.params["bits"] - b) in (1, round(step)) for b in before), trial.params


def test_without_a_front_there_is_nothing_to_refine(tmp_path: Path) -> None:
    opened = study(tmp_path, predict_trial=by_bits, refine=1.0, limits=())
    asked = work_off(opened, lambda _: samples.result(failure=FAILED))
    assert {trial.origin for trial in asked} == {"sampled"}


# definitions


CHANGED: dict[str, tuple[Callable[[Path], Study], str]] = {
    "objective": (
        lambda folder: study(folder, objectives={RATIO: "maximize", DECODE: "minimize"}),
        f"objective {RATIO}: stored minimize, new maximize",
    ),
    "limit": (
        lambda folder: study(folder, (*LIMITS[:2], Limit(metric=RSS, unit="MiB", absolute=80.0))),
        f"limit {RSS}: stored at most 90 MiB, new at most 80 MiB",
    ),
    "removed limit": (
        lambda folder: study(folder, limits=LIMITS[:2]),
        f"limit {RSS}: stored at most 90 MiB, new none",
    ),
    "parameter": (
        lambda folder: study(folder, parameters={"bits": {"choices": [4, 8]}}),
        'parameter bits: stored {"choices": [4, 8, 16, 32]}, new {"choices": [4, 8]}',
    ),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_changed_definition_is_rejected_with_both_values(tmp_path: Path, changed: str) -> None:
    study(tmp_path)
    reopen, difference = CHANGED[changed]
    with pytest.raises(ConfigError, match=r"search\.study=NAME") as caught:
        reopen(tmp_path)
    assert difference in str(caught.value)
    assert "already exists with another definition" in str(caught.value)


def test_budget_sampler_seed_and_the_order_of_limits_may_change(tmp_path: Path) -> None:
    finish(study(tmp_path))
    other = study(tmp_path, LIMITS[::-1], trials=9, sampler="tpe", seed=5, trial_timeout_s=1.0, time="1 h", refine=0.5)
    assert len(other.trials()) == 1


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"study": ""}, "study"),
        ({"study": "a/b"}, "study"),
        ({"trials": 0}, "trials"),
        ({"spread": -1}, "spread"),
        ({"refine": -0.1}, "refine"),
        ({"refine": 1.1}, "refine"),
        ({"refine": math.nan}, "refine"),
        ({"stagnation": 0}, "stagnation"),
        ({"time": "0 s"}, "time"),
        ({"time": "3 MiB"}, "time"),
        ({"energy": "much"}, "energy"),
        ({"objectives": {}}, "objectives"),
        ({"trial_timeout_s": 0}, "trial_timeout_s"),
        ({"trial_timeout_s": math.nan}, "trial_timeout_s"),
        ({"lease_s": 0}, "lease_s"),
        ({"parameters": {}}, "search.parameters"),
        ({"enqueue": ({"bits": 5},)}, "search.enqueue"),
    ],
)
def test_a_search_that_cannot_run_is_refused(values: dict[str, Any], location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(**values)
    assert caught.value.location.startswith(location)


def test_what_may_be_spent_has_units() -> None:
    found = search(time="2 h", energy="50 kJ")
    assert (found.time_s, found.energy_j) == (7200.0, 50_000.0)
