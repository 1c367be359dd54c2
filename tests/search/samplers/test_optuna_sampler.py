from __future__ import annotations

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
from support.studies import DECODE, FAILED, LIMITS, RATIO, RSS, search

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


def row(
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


def sampler(name: str = "tpe", parameters: Mapping[str, Any] = SPACE, *, seed: int = 0) -> OptunaSampler:
    return OptunaSampler(search(sampler=name, parameters=parameters), OBJECTIVES, LIMITS, seed=seed)


def told(made: OptunaSampler) -> list[FrozenTrial]:
    """What Optuna knows, without what was withdrawn."""
    return [trial for trial in made._study.trials if trial.state != OptunaState.FAIL]


def judged(metric: str, excess: float | None, *, satisfied: bool = False, predicted: bool = False) -> Verdict:
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


def with_figure(metric: str, value: float) -> TrialResult:
    """As it is judged: a figure that is no number has no excess."""
    whole = samples.result()
    figures = tuple(replace(m, value=value) if m.metric == metric else m for m in whole.measurements)
    verdicts = tuple(replace(v, excess=None, satisfied=False) if v.metric == metric else v for v in whole.verdicts)
    return replace(whole, measurements=figures, verdicts=verdicts)


# constraints


def test_every_limit_is_a_constraint_by_its_excess() -> None:
    summary = TrialSummary.from_result(samples.result(decode_ms=2.08, ratio=1.0, rss_mib=45.0))
    assert constraint_values(summary, LIMITS) == pytest.approx({RATIO: 1.0 / 1.15 - 1, DECODE: 1.0, RSS: -0.5})


def test_a_failed_trial_violates_every_constraint() -> None:
    summary = TrialSummary.from_result(samples.result(failure=FAILED))
    assert constraint_values(summary, LIMITS) == dict.fromkeys((RATIO, DECODE, RSS), UNMEASURED_EXCESS)


def test_what_was_not_measured_or_is_no_number_is_a_violated_constraint() -> None:
    summary = with_verdicts(judged(RATIO, None), judged(DECODE, -0.5, satisfied=True))
    assert constraint_values(summary, LIMITS) == {RATIO: UNMEASURED_EXCESS, DECODE: -0.5, RSS: UNMEASURED_EXCESS}


def test_a_figure_that_proves_nothing_is_a_violated_constraint() -> None:
    summary = with_verdicts(judged(RATIO, -0.5), judged(DECODE, 0.0), judged(RSS, 0.3))
    assert constraint_values(summary, LIMITS) == {RATIO: MIN_UNPROVEN_EXCESS, DECODE: MIN_UNPROVEN_EXCESS, RSS: 0.3}


def test_of_a_refused_trial_what_is_known_counts_and_nothing_else_misleads() -> None:
    summary = with_verdicts(
        judged(RATIO, None),
        judged(DECODE, -0.2, predicted=True),
        judged(RSS, 0.7, predicted=True),
        refused="prediction",
    )
    assert constraint_values(summary, LIMITS) == {RATIO: 0.0, DECODE: -0.2, RSS: 0.7}
    assert constraint_values(replace(summary, verdicts={}), LIMITS) == dict.fromkeys((RATIO, DECODE, RSS), 0.0)


def test_of_a_stopped_trial_limits_within_are_kept_as_far_as_is_known() -> None:
    summary = with_verdicts(judged(RATIO, -0.2), judged(DECODE, 0.4), refused="quality")
    assert constraint_values(summary, LIMITS) == {RATIO: -0.2, DECODE: 0.4, RSS: 0.0}


@given(
    held=st.dictionaries(
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
def test_a_trial_that_broke_something_is_infeasible_to_the_sampler_too(held: dict[str, VerdictSummary]) -> None:
    assert any(value > 0 for value in constraint_values(TrialSummary(verdicts=held), LIMITS).values())


# what Optuna is told


def test_a_finished_trial_is_complete_with_values_and_constraints() -> None:
    made = sampler()
    made.update([row(3, samples.result(decode_ms=0.5, ratio=1.1))])
    (trial,) = told(made)
    assert (trial.state, trial.values, trial.params) == (OptunaState.COMPLETE, [1.1, 0.5], {"x": 0.03})
    assert trial.constraints == pytest.approx({RATIO: 1.1 / 1.15 - 1, DECODE: 0.5 / 1.04 - 1, RSS: 70 / 90 - 1})


@pytest.mark.parametrize(
    "result",
    [
        samples.result(failure=FAILED),
        replace(samples.result(), refused="quality"),
        replace(samples.result(), refused="prediction", measurements=()),
        with_figure(DECODE, math.nan),
        with_figure(RATIO, math.inf),
        replace(samples.result(), measurements=samples.result().measurements[:1]),
    ],
    ids=["failed", "stopped", "refused", "NaN", "infinite", "without an objective"],
)
def test_a_trial_without_all_values_is_pruned_with_its_constraints(result: TrialResult) -> None:
    made = sampler()
    made.update([row(0, result)])
    (trial,) = told(made)
    assert trial.state == OptunaState.PRUNED
    assert set(trial.constraints) == {RATIO, DECODE, RSS}


def test_what_waits_is_not_told_and_what_runs_has_no_constraints() -> None:
    made = sampler()
    made.update([row(0, state="waiting"), row(1, state="running")])
    (trial,) = told(made)
    assert (trial.state, trial.params) == (OptunaState.RUNNING, {"x": 0.01})
    assert not trial.constraints


def test_a_trial_is_told_once_however_often_it_changes() -> None:
    made, result = sampler(), samples.result()
    for _ in range(2):
        made.update([row(0), row(1)])
    assert [trial.state for trial in told(made)] == [OptunaState.RUNNING] * 2
    made.update([row(0, state="waiting")])
    made.update([row(0)])
    for recorded in (False, True):
        made.update([replace(row(0, result), recorded=recorded)])
    assert sorted(trial.state for trial in told(made)) == [OptunaState.RUNNING, OptunaState.COMPLETE]


def test_a_trial_that_is_tried_again_begins_with_clean_constraints() -> None:
    made = sampler()
    made.update([row(0, samples.result(failure=FAILED))])
    made.update([row(0, state="waiting")])
    for again in (row(0), row(0, samples.result())):
        made.update([replace(again, attempt=2)])
    constraints = [trial.constraints for trial in told(made)]
    assert constraint_values(TrialSummary.from_result(samples.result()), LIMITS) in constraints


def test_an_empty_proposal_leaves_nothing_behind() -> None:
    made = sampler()
    for _ in range(3):
        params, _ = made.propose()
        assert set(params) == {"x"}
    assert told(made) == []


# hints


def test_generations_go_on_in_another_process() -> None:
    """NSGA-II notes the generation of a proposal beside it, and takes its parents from the one before."""
    from optuna.samplers import NSGAIISampler

    size = NSGAIISampler()._population_size
    first, rows = sampler("nsga2"), list[Trial]()
    for number in range(size):
        params, sampler_attrs = first.propose()
        rows.append(row(number, samples.result(ratio=1 + params["x"]), params, sampler_attrs=sampler_attrs))
        first.update(rows[-1:])
    (key,) = {key for r in rows for key in r.sampler_attrs if "generation" in key}
    assert {r.sampler_attrs[key] for r in rows} == {0}
    other = sampler("nsga2", seed=9)
    other.update(rows)
    assert other.propose()[1][key] == first.propose()[1][key] == 1
    without = sampler("nsga2", seed=9)
    without.update([replace(r, sampler_attrs={}) for r in rows])
    assert without.propose()[1][key] == 0, "it is the hints that tell"


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp", "random"])
def test_hints_are_plain_data(name: str) -> None:
    import json

    made = sampler(name)
    for number in range(12):
        params, sampler_attrs = made.propose()
        made.update(
            [
                row(
                    number,
                    samples.result(ratio=1 + params["x"]),
                    params,
                    sampler_attrs=json.loads(json.dumps(sampler_attrs)),
                )
            ]
        )


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
def test_proposals_stand_in_the_space_and_can_be_told_again(seed: int, name: str) -> None:
    made = sampler(name, CONDITIONAL, seed=seed)
    space = search(parameters=CONDITIONAL).space
    for number in range(12):
        params, sampler_attrs = made.propose()
        space.validate(params)
        made.update([row(number, samples.result(ratio=1 + number / 20), params, sampler_attrs=sampler_attrs)])
    assert [set(trial.params) for trial in told(made)] == [set(t.distributions) for t in told(made)]


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp", "random"])
def test_the_same_seed_and_history_propose_the_same(name: str) -> None:
    def proposals() -> list[Params]:
        made = sampler(name, seed=4)
        made.update([row(n, samples.result(ratio=1 + n / 50)) for n in range(10)])
        return [made.propose()[0] for _ in range(3)]

    assert proposals() == proposals()
