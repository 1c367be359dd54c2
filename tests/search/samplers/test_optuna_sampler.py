from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from support import samples
from support.studies import DECODE, FAILED, LIMITS, RATIO, RSS, create_search

from edgeopt.core.result import TrialResult, Verdict
from edgeopt.core.study_snapshot import TrialState
from edgeopt.search.pareto.front import Objective
from edgeopt.search.samplers.optuna_sampler import (
    MIN_UNPROVEN_EXCESS,
    UNMEASURED_EXCESS,
    OptunaSampler,
    constraint_values,
)
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_summary import TrialSummary, VerdictSummary
from edgeopt.search.study import final_state

OBJECTIVES = (Objective(metric=RATIO), Objective(metric=DECODE))
SPACE = {"x": {"low": 0.0, "high": 1.0}}


def create_trial(
    number: int,
    result: TrialResult | None = None,
    params: Params | None = None,
    *,
    state: TrialState = "running",
    sampler_attrs: Mapping[str, Any] | None = None,
) -> Trial:
    return Trial(
        number=number,
        params={"x": number / 100} if params is None else params,
        state=state if result is None else final_state(result),
        origin="sampled",
        attempt=1,
        worker="w",
        built=False,
        recorded=False,
        run_id="",
        ended_s=None,
        sampler_attrs=sampler_attrs or {},
        summary=None if result is None else TrialSummary.from_result(result),
        revision=number,
    )


def create_sampler(name: str = "tpe", parameters: Mapping[str, Any] = SPACE, *, seed: int = 0) -> OptunaSampler:
    return OptunaSampler(create_search(sampler=name, parameters=parameters), OBJECTIVES, LIMITS, seed=seed)


def optuna_trials(sampler: OptunaSampler) -> list[FrozenTrial]:
    """Return the trials of the Optuna study without discarded ones."""
    return [trial for trial in sampler._study.trials if trial.state != OptunaState.FAIL]


def verdict(metric: str, excess: float | None, *, satisfied: bool = False, predicted: bool = False) -> Verdict:
    return Verdict(
        metric=metric,
        limit="",
        bound=1.0,
        value=1.0,
        excess=excess,
        satisfied=satisfied,
        reason="",
        predicted=predicted,
    )


def with_verdicts(*verdicts: Verdict, refused: str = "") -> TrialSummary:
    return TrialSummary.from_result(replace(samples.result(), verdicts=verdicts, refused=refused))


def with_value(metric: str, value: float) -> TrialResult:
    """Return a result with another value of one metric, whose verdict has no excess."""
    result = samples.result()
    measurements = tuple(replace(m, value=value) if m.metric == metric else m for m in result.measurements)
    verdicts = tuple(replace(v, excess=None, satisfied=False) if v.metric == metric else v for v in result.verdicts)
    return replace(result, measurements=measurements, verdicts=verdicts)


# constraints


def test_excess_of_every_limit_is_a_constraint() -> None:
    summary = TrialSummary.from_result(samples.result(decode_ms=2.08, ratio=1.0, rss_mib=45.0))
    assert constraint_values(summary, LIMITS) == pytest.approx({RATIO: 1.0 / 1.15 - 1, DECODE: 1.0, RSS: -0.5})


def test_failed_trial_violates_every_constraint() -> None:
    summary = TrialSummary.from_result(samples.result(failure=FAILED))
    assert constraint_values(summary, LIMITS) == dict.fromkeys((RATIO, DECODE, RSS), UNMEASURED_EXCESS)


def test_unmeasured_metric_is_a_violated_constraint() -> None:
    summary = with_verdicts(verdict(RATIO, None), verdict(DECODE, -0.5, satisfied=True))
    assert constraint_values(summary, LIMITS) == {RATIO: UNMEASURED_EXCESS, DECODE: -0.5, RSS: UNMEASURED_EXCESS}


def test_unproven_value_is_a_violated_constraint() -> None:
    summary = with_verdicts(verdict(RATIO, -0.5), verdict(DECODE, 0.0), verdict(RSS, 0.3))
    assert constraint_values(summary, LIMITS) == {RATIO: MIN_UNPROVEN_EXCESS, DECODE: MIN_UNPROVEN_EXCESS, RSS: 0.3}


def test_unjudged_limits_of_refused_trial_are_neutral() -> None:
    summary = with_verdicts(
        verdict(RATIO, None),
        verdict(DECODE, -0.2, predicted=True),
        verdict(RSS, 0.7, predicted=True),
        refused="prediction",
    )
    assert constraint_values(summary, LIMITS) == {RATIO: 0.0, DECODE: -0.2, RSS: 0.7}
    assert constraint_values(replace(summary, verdicts={}), LIMITS) == dict.fromkeys((RATIO, DECODE, RSS), 0.0)


def test_satisfied_limits_of_stopped_trial_keep_their_excess() -> None:
    summary = with_verdicts(verdict(RATIO, -0.2), verdict(DECODE, 0.4), refused="quality")
    assert constraint_values(summary, LIMITS) == {RATIO: -0.2, DECODE: 0.4, RSS: 0.0}


@given(
    verdicts=st.dictionaries(
        st.sampled_from([RATIO, DECODE, RSS]),
        st.builds(
            VerdictSummary,
            excess=st.none() | st.floats(-1, 5),
            satisfied=st.just(False),
            predicted=st.just(False),
            bound=st.none(),
        ),
    )
)
def test_unsatisfied_limit_violates_a_constraint(verdicts: dict[str, VerdictSummary]) -> None:
    assert any(value > 0 for value in constraint_values(TrialSummary(verdicts=verdicts), LIMITS).values())


# trials in Optuna


def test_finished_trial_has_values_and_constraints() -> None:
    sampler = create_sampler()
    sampler.update([create_trial(3, samples.result(decode_ms=0.5, ratio=1.1))])
    (trial,) = optuna_trials(sampler)
    assert (trial.state, trial.values, trial.params) == (OptunaState.COMPLETE, [1.1, 0.5], {"x": 0.03})
    assert trial.constraints == pytest.approx({RATIO: 1.1 / 1.15 - 1, DECODE: 0.5 / 1.04 - 1, RSS: 70 / 90 - 1})


@pytest.mark.parametrize(
    "result",
    [
        samples.result(failure=FAILED),
        replace(samples.result(), refused="quality"),
        replace(samples.result(), refused="prediction", measurements=()),
        with_value(DECODE, math.nan),
        with_value(RATIO, math.inf),
        replace(samples.result(), measurements=samples.result().measurements[:1]),
    ],
    ids=["failed", "stopped", "refused", "NaN", "infinite", "without an objective"],
)
def test_trial_without_all_objectives_is_pruned(result: TrialResult) -> None:
    sampler = create_sampler()
    sampler.update([create_trial(0, result)])
    (trial,) = optuna_trials(sampler)
    assert trial.state == OptunaState.PRUNED
    assert set(trial.constraints) == {RATIO, DECODE, RSS}


def test_running_trial_has_no_constraints() -> None:
    sampler = create_sampler()
    sampler.update([create_trial(0, state="waiting"), create_trial(1, state="running")])
    (trial,) = optuna_trials(sampler)
    assert (trial.state, trial.params) == (OptunaState.RUNNING, {"x": 0.01})
    assert not trial.constraints


def test_each_trial_is_known_to_optuna_once() -> None:
    sampler, result = create_sampler(), samples.result()
    for _ in range(2):
        sampler.update([create_trial(0), create_trial(1)])
    assert [trial.state for trial in optuna_trials(sampler)] == [OptunaState.RUNNING] * 2
    sampler.update([create_trial(0, state="waiting")])
    sampler.update([create_trial(0)])
    for recorded in (False, True):
        sampler.update([replace(create_trial(0, result), recorded=recorded)])
    assert sorted(trial.state for trial in optuna_trials(sampler)) == [OptunaState.RUNNING, OptunaState.COMPLETE]


def test_next_attempt_starts_without_constraints() -> None:
    sampler = create_sampler()
    sampler.update([create_trial(0, samples.result(failure=FAILED))])
    sampler.update([create_trial(0, state="waiting")])
    for second_attempt in (create_trial(0), create_trial(0, samples.result())):
        sampler.update([replace(second_attempt, attempt=2)])
    constraints = [trial.constraints for trial in optuna_trials(sampler)]
    assert constraint_values(TrialSummary.from_result(samples.result()), LIMITS) in constraints


def test_proposals_leave_no_optuna_trials() -> None:
    sampler = create_sampler()
    for _ in range(3):
        params, _ = sampler.propose()
        assert set(params) == {"x"}
    assert optuna_trials(sampler) == []


# sampler attributes


def test_nsga2_generations_continue_in_another_process() -> None:
    """NSGA-II stores the generation of a proposal in its attributes and takes parents from the previous one."""
    from optuna.samplers import NSGAIISampler

    size = NSGAIISampler()._population_size
    first, trials = create_sampler("nsga2"), list[Trial]()
    for number in range(size):
        params, sampler_attrs = first.propose()
        trials.append(create_trial(number, samples.result(ratio=1 + params["x"]), params, sampler_attrs=sampler_attrs))
        first.update(trials[-1:])
    (key,) = {key for t in trials for key in t.sampler_attrs if "generation" in key}
    assert {t.sampler_attrs[key] for t in trials} == {0}
    resumed = create_sampler("nsga2", seed=9)
    resumed.update(trials)
    assert resumed.propose()[1][key] == first.propose()[1][key] == 1
    without_attrs = create_sampler("nsga2", seed=9)
    without_attrs.update([replace(t, sampler_attrs={}) for t in trials])
    assert without_attrs.propose()[1][key] == 0, "generations depend on the attributes"


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp", "random"])
def test_sampler_attrs_are_plain_json(name: str) -> None:
    sampler = create_sampler(name)
    for number in range(12):
        params, sampler_attrs = sampler.propose()
        stored = json.loads(json.dumps(sampler_attrs))
        sampler.update([create_trial(number, samples.result(ratio=1 + params["x"]), params, sampler_attrs=stored)])


# spaces


CONDITIONAL = {
    "recipe": {"choices": ["int4", "prune", None]},
    "bits": {"choices": [4, 8], "when": {"recipe": ["int4", "prune"]}},
    "ratio": {"low": 0.1, "high": 0.5, "step": 0.1, "when": {"recipe": "prune"}},
    "rate": {"low": 1e-6, "high": 1e-2, "log": True},
    "count": {"low": 8, "high": 32, "step": 8},
}


@settings(max_examples=10)
@given(seed=st.integers(0, 2**20), name=st.sampled_from(["tpe", "nsga2", "random"]))
def test_proposals_are_in_the_space(seed: int, name: str) -> None:
    sampler = create_sampler(name, CONDITIONAL, seed=seed)
    space = create_search(parameters=CONDITIONAL).space
    for number in range(12):
        params, sampler_attrs = sampler.propose()
        space.validate(params)
        result = samples.result(ratio=1 + number / 20)
        sampler.update([create_trial(number, result, params, sampler_attrs=sampler_attrs)])
    trials = optuna_trials(sampler)
    assert [set(trial.params) for trial in trials] == [set(trial.distributions) for trial in trials]


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp", "random"])
def test_same_seed_and_trials_give_same_proposals(name: str) -> None:
    def proposals() -> list[Params]:
        sampler = create_sampler(name, seed=4)
        sampler.update([create_trial(n, samples.result(ratio=1 + n / 50)) for n in range(10)])
        return [sampler.propose()[0] for _ in range(3)]

    assert proposals() == proposals()
