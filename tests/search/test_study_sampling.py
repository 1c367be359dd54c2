from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support import samples
from support.studies import (
    FAILED,
    finish_next,
    open_study,
    predict_by_bits,
    prediction,
    run_search,
)

from edgeopt.core.result import TrialResult
from edgeopt.search.prediction import Prediction
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import Trial

STOPPED = replace(samples.result(decode_ms=9.0), refused="quality")


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random"])
def test_every_sampler_handles_all_outcomes(tmp_path: Path, sampler: str) -> None:
    parameters = {
        "recipe": {"choices": ["a", "b"]},
        "bits": {"low": 1, "high": 400},
        "ratio": {"low": 0.0, "high": 1.0, "when": {"recipe": "b"}},
    }

    def predict_trial(params: Params) -> Prediction:
        if params["bits"] % 7 == 0:
            return prediction(failure=FAILED)
        return prediction(rss=200.0 if params["bits"] % 5 == 0 else 50.0)

    complete = samples.result()
    not_finite = tuple(replace(m, value=math.nan, high=math.nan) for m in complete.measurements)
    unproven = tuple(replace(v, excess=None, satisfied=False) for v in complete.verdicts)
    results = itertools.cycle(
        [
            samples.result(),
            samples.result(failure=FAILED),
            samples.result(ratio=3.0),
            STOPPED,
            replace(complete, measurements=not_finite, verdicts=unproven),
            replace(complete, measurements=complete.measurements[:1], verdicts=complete.verdicts[:1]),
        ]
    )
    study = open_study(tmp_path, sampler=sampler, parameters=parameters, predict_trial=predict_trial, trials=24)
    run_search(study, lambda trial: next(results))
    trials = study.trials()
    assert sum(trial.state != "refused" for trial in trials) == 24
    assert {trial.state for trial in trials} >= {"finished", "stopped", "failed"}
    for trial in trials:
        study.search.space.validate(trial.params)
    resumed = open_study(tmp_path, sampler=sampler, parameters=parameters, predict_trial=predict_trial, trials=25)
    assert run_search(resumed, lambda trial: next(results)), "a resumed search continues"


def test_resumed_search_proposes_new_recipes(tmp_path: Path) -> None:
    parameters = {"x": {"low": 0.0, "high": 1.0}}
    first = open_study(tmp_path, parameters=parameters, trials=2)
    second = open_study(tmp_path / "other", parameters=parameters, trials=2)
    assert finish_next(first).params == finish_next(second).params, "the seed determines the first proposal"
    resumed = open_study(tmp_path, parameters=parameters, trials=2)
    assert finish_next(resumed).params != first.trials()[0].params


def test_tpe_learns_the_feasible_region(tmp_path: Path) -> None:
    parameters = {"x": {"low": 0.0, "high": 1.0}}
    study = open_study(tmp_path, sampler="tpe", parameters=parameters, trials=40)
    run_search(study, lambda trial: samples.result(ratio=1.0 + abs(trial.params["x"] - 0.8)))
    late = [trial.params["x"] for trial in study.trials()[20:]]
    assert sum(0.65 <= x <= 0.95 for x in late) > 0.6 * len(late), "random search would hit 0.3 of them"


# refinement


def test_last_trials_are_neighbours_of_the_front(tmp_path: Path) -> None:
    parameters = {"bits": {"low": 1, "high": 64, "step": 1}}
    study = open_study(tmp_path, (), parameters=parameters, predict_trial=predict_by_bits, trials=8, refine=0.5)

    def evaluate(trial: Trial) -> TrialResult:
        result = samples.result(decode_ms=trial.params["bits"] / 10, ratio=1 + 1 / trial.params["bits"])
        return replace(result, verdicts=())

    asked = run_search(study, evaluate)
    assert [trial.origin for trial in asked] == ["sampled"] * 4 + ["refined"] * 4
    for n, trial in enumerate(asked[4:], start=4):
        assert any(abs(trial.params["bits"] - earlier.params["bits"]) == 1 for earlier in asked[:n]), trial.params


def test_empty_front_is_not_refined(tmp_path: Path) -> None:
    study = open_study(tmp_path, predict_trial=predict_by_bits, refine=1.0, limits=())
    asked = run_search(study, lambda _: samples.result(failure=FAILED))
    assert {trial.origin for trial in asked} == {"sampled"}
