from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import samples

from edgeopt.errors import ConfigError, StoreError
from edgeopt.result import Failure, TrialResult
from edgeopt.search.front import Objective
from edgeopt.search.loop import Sweep, run
from edgeopt.search.space import Params
from edgeopt.search.study import UNMEASURED_EXCESS, UNPROVEN_EXCESS, Search, Study
from edgeopt.target import Limit

DECODE, RATIO, RSS = "latency/decode_p50_ms", "quality/perplexity_ratio", "memory/peak_rss_mib"
LIMITS = (
    Limit(metric=RATIO, unit="", absolute=1.15),
    Limit(metric=DECODE, unit="ms", absolute=1.04),
    Limit(metric=RSS, unit="MiB", absolute=90.0),
)
FAILED = Failure(stage="build", kind="BuildError", message="no")


def search(**more: Any) -> Search:
    known: dict[str, Any] = {
        "study": "s",
        "objectives": {RATIO: "minimize", DECODE: "minimize"},
        "sampler": "random",
        "trials": 4,
        "parameters": {"bits": {"choices": [4, 8, 16, 32]}},
    }
    return Search(**known | more)


def study(folder: Path, limits: tuple[Limit, ...] = LIMITS, **more: Any) -> Study:
    found = search(**more)
    objectives = tuple(Objective(metric=m, direction=d) for m, d in found.objectives.items())  # type: ignore[arg-type]
    return Study(folder=folder, search=found, objectives=objectives, limits=limits)


def finish(opened: Study, result: TrialResult | None = None) -> int:
    asked = opened.ask()
    assert asked is not None
    trial, _ = asked
    result = result or samples.result()
    opened.save(trial.number, result)
    opened.tell(trial, result)
    return trial.number


def constraints(folder: Path, number: int) -> dict[str, float]:
    """The constraints that Optuna itself keeps of a trial."""
    (name,) = optuna.get_all_study_names(f"sqlite:///{folder / 'optuna.db'}")
    return dict(
        optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'optuna.db'}").trials[number].constraints
    )


class Log:
    """What the tracking server was told, in order."""

    def __init__(self, *, left_open: tuple[int, ...] = ()) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.left_open = left_open

    def begin(self, number: int, params: Params) -> None:
        self.told.append(("begin", number))

    def record(self, number: int, params: Params, result: TrialResult) -> None:
        self.told.append(("record", number, dict(params)))

    def kill(self, number: int, why: str = "") -> None:
        self.told.append(("kill", number))

    def open_trials(self) -> list[int]:
        return list(self.left_open)


# resume


def test_a_resumed_study_keeps_what_was_finished_and_goes_on(tmp_path: Path) -> None:
    first = study(tmp_path)
    results = {finish(first, samples.result(decode_ms=0.1 * n)): 0.1 * n for n in (1, 2)}
    again = study(tmp_path)
    assert {n: r.metrics[DECODE] for n, r in again.finished().items()} == results
    finish(again)
    finish(again)
    assert again.ask() is None, "the budget counts trials of all sessions"
    assert len(again.finished()) == 4


def test_a_space_is_tried_without_repeats(tmp_path: Path) -> None:
    opened = study(tmp_path, trials=50)
    while (asked := opened.ask()) is not None:
        opened.save(asked[0].number, samples.result())
        opened.tell(asked[0], samples.result())
    tried = [e.params["bits"] for e in opened.entries()]
    assert sorted(tried) == [4, 8, 16, 32], "an exhausted space ends the search"


def test_a_failed_recipe_is_not_tried_again(tmp_path: Path) -> None:
    opened = study(tmp_path, parameters={"bits": {"choices": [4, 8]}}, trials=9)
    finish(opened, samples.result(failure=FAILED))
    finish(opened)
    assert sorted(e.params["bits"] for e in opened.entries()) == [4, 8]
    assert [(e.state, e.result is not None) for e in opened.entries()] == [("failed", True), ("finished", True)]


def test_known_recipes_come_first_and_once(tmp_path: Path) -> None:
    known = ({"bits": 8}, {"bits": 32})
    first = study(tmp_path, enqueue=known)
    first.enqueue_known()
    finish(first)
    again = study(tmp_path, enqueue=known)
    again.enqueue_known()
    finish(again)
    assert [e.params for e in again.entries()] == list(known)


# kills


@pytest.mark.parametrize("recorded", [False, True], ids=["before record", "before tell"])
def test_a_kill_after_the_result_was_saved_is_completed(tmp_path: Path, recorded: bool) -> None:
    dying, log = study(tmp_path), Log()
    trial, params = dying.ask() or pytest.fail("nothing asked")
    dying.save(trial.number, samples.result())
    if recorded:
        log.record(trial.number, params, samples.result())
    again = study(tmp_path)
    assert again.finished() == {}
    again.recover(log.record)
    assert list(again.finished()) == [trial.number]
    assert again.finished()[trial.number] == samples.result()
    assert log.told[-1] == ("record", trial.number, params)
    assert len(constraints(tmp_path, trial.number)) == len(LIMITS)
    again.recover(log.record)
    assert len(log.told) == 1 + recorded, "what is complete is not completed again"


@pytest.mark.parametrize("gone", ["engine", "artifact"])
def test_a_result_whose_files_were_evicted_before_it_was_recorded_is_tried_again(tmp_path: Path, gone: str) -> None:
    for _ in range(2):  # as often as it happens
        dying = study(tmp_path)
        dying.recover(lambda *_: pytest.fail("there is nothing to record"))
        trial, params = dying.ask() or pytest.fail("nothing asked")
        files = {"engine": {"directory": str(tmp_path / "engine"), "digest": "", "size_bytes": 1}, "artifacts": {}}
        if gone == "artifact":
            files = {"engine": None, "artifacts": {"logs": str(tmp_path / "logs")}}
        dying.save(trial.number, replace(samples.result(), **files))
    again = study(tmp_path)
    again.recover(lambda *_: pytest.fail("there is nothing to record"))
    assert (again.ask() or pytest.fail("nothing asked"))[1] == params
    assert again.finished() == {}
    assert not [e for e in again.entries() if e.result is not None]


def test_a_kill_between_constraints_and_values_is_completed(tmp_path: Path) -> None:
    dying = study(tmp_path)
    trial, _ = dying.ask() or pytest.fail("nothing asked")
    dying.save(trial.number, samples.result())
    trial.set_constraint(RATIO, -0.05)
    again = study(tmp_path)
    again.recover(lambda *_: None)
    assert list(again.finished()) == [trial.number]
    assert constraints(tmp_path, trial.number).keys() == {RATIO, DECODE, RSS}


def test_an_interrupted_trial_is_queued_again_once(tmp_path: Path) -> None:
    numbers, recipes, log = [], [], Log()
    for _ in range(3):  # the process dies in each trial
        dying = study(tmp_path)
        dying.recover(log.record)
        trial, params = dying.ask() or pytest.fail("nothing asked")
        numbers.append(trial.number)
        recipes.append(params)
    assert recipes[1] == recipes[0], "the recipe that was cut off comes first"
    assert log.told == [], "nothing was finished, so nothing is recorded"
    states = {e.number: e.state for e in study(tmp_path).entries()}
    assert states == {numbers[0]: "interrupted", numbers[1]: "interrupted", numbers[2]: "running"}
    waiting = [e for e in study(tmp_path).entries() if e.state == "waiting"]
    assert waiting == [], "a recipe that kills its process twice is not queued for ever"


def test_a_trial_given_up_by_hand_is_the_next_one(tmp_path: Path) -> None:
    opened = study(tmp_path)
    trial, params = opened.ask() or pytest.fail("nothing asked")
    opened.interrupt(trial)
    again = study(tmp_path)
    again.recover(lambda *_: pytest.fail("nothing was finished"))
    assert (again.ask() or pytest.fail("nothing asked"))[1] == params
    assert again.finished() == {}, "an interrupted trial costs no budget"


def test_half_a_result_is_no_result(tmp_path: Path) -> None:
    dying = study(tmp_path)
    trial, _ = dying.ask() or pytest.fail("nothing asked")
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / f"{trial.number}.partial").write_text('{"recipe": ')
    again = study(tmp_path)
    again.recover(lambda *_: pytest.fail("nothing was finished"))
    assert {e.number: e.state for e in again.entries()}[trial.number] == "interrupted"
    assert again.finished() == {}


# what Optuna is told


def test_every_limit_is_a_constraint_by_its_excess(tmp_path: Path) -> None:
    opened = study(tmp_path)
    number = finish(opened, samples.result(decode_ms=2.08, ratio=1.0, rss_mib=45.0))
    assert constraints(tmp_path, number) == pytest.approx({RATIO: 1.0 / 1.15 - 1, DECODE: 1.0, RSS: -0.5})


def test_a_failed_trial_violates_every_constraint(tmp_path: Path) -> None:
    number = finish(study(tmp_path), samples.result(failure=FAILED))
    assert constraints(tmp_path, number) == dict.fromkeys((RATIO, DECODE, RSS), UNMEASURED_EXCESS)


def test_a_metric_that_was_not_measured_is_a_violated_constraint(tmp_path: Path) -> None:
    whole = samples.result()
    verdicts = (replace(whole.verdicts[0], value=None, excess=None, kept=False), *whole.verdicts[1:2])
    number = finish(study(tmp_path), replace(whole, verdicts=verdicts))
    found = constraints(tmp_path, number)
    assert found[RATIO] == found[RSS] == UNMEASURED_EXCESS
    assert found[DECODE] < 0


def test_a_figure_that_proves_nothing_is_a_violated_constraint(tmp_path: Path) -> None:
    whole = samples.result()
    noisy = tuple(replace(v, kept=False, reason="disturbed") for v in whole.verdicts)
    number = finish(study(tmp_path), replace(whole, verdicts=noisy))
    assert set(constraints(tmp_path, number).values()) == {UNPROVEN_EXCESS}


def test_only_feasible_trials_are_ranked(tmp_path: Path) -> None:
    opened = study(tmp_path)
    good = finish(opened, samples.result(decode_ms=0.5))
    finish(opened, samples.result(decode_ms=0.1, ratio=9.0))
    finish(opened, samples.result(failure=FAILED))
    assert opened.ranks() == {good: 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_a_finished_trial_and_never_on_the_front(tmp_path: Path, value: float) -> None:
    whole = samples.result()
    broken = tuple(replace(m, value=value) if m.metric == DECODE else m for m in whole.measurements)
    opened = study(tmp_path, limits=())
    number = finish(opened, replace(whole, measurements=broken, verdicts=()))
    assert [e.state for e in opened.entries()] == ["finished"]
    assert number not in opened.ranks()
    assert (opened.ask() or pytest.fail("the search goes on"))[0].number != number


# definitions


CHANGED: dict[str, Callable[[Path], Study]] = {
    "objectives": lambda f: study(f, objectives={RATIO: "maximize", DECODE: "minimize"}),
    "limits": lambda f: study(f, limits=LIMITS[:2]),
    "parameters": lambda f: study(f, parameters={"bits": {"choices": [4, 8]}}),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_study_is_not_continued_under_another_definition(tmp_path: Path, changed: str) -> None:
    study(tmp_path)
    with pytest.raises(ConfigError, match=rf"begun with other {changed}.*search\.study=NAME"):
        CHANGED[changed](tmp_path)


def test_budget_sampler_and_seed_may_change(tmp_path: Path) -> None:
    finish(study(tmp_path))
    assert len(study(tmp_path, trials=9, sampler="tpe", seed=5, trial_timeout_s=1.0).finished()) == 1


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"study": ""}, "study"),
        ({"study": "a/b"}, "study"),
        ({"trials": 0}, "trials"),
        ({"objectives": {}}, "objectives"),
        ({"trial_timeout_s": 0}, "trial_timeout_s"),
        ({"parameters": {}}, "search.parameters"),
        ({"enqueue": ({"bits": 5},)}, "search.enqueue"),
        ({"trial_timeout_s": math.nan}, "trial_timeout_s"),
    ],
)
def test_a_search_that_cannot_run_is_refused(values: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(**values)
    assert caught.value.place.startswith(place)


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        study(tmp_path / "file")


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_every_sampler_searches_under_constraints(tmp_path: Path, sampler: str) -> None:
    opened = study(tmp_path, sampler=sampler, parameters={"bits": {"low": 1, "high": 40}}, trials=10)
    for n in range(10):
        finish(opened, samples.result(failure=FAILED) if n % 3 == 0 else samples.result(ratio=1 + n / 10))
    assert len({e.params["bits"] for e in opened.entries()}) == 10


# the loop


class Stub:
    """A worker that answers from a script: a result, a failure, or Ctrl-C."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.closed = script, False

    def run(self, params: Params, progress: Callable[[str], None]) -> TrialResult | Failure:
        answer = self.script.pop(0)
        if isinstance(answer, type):
            raise answer
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed = True


class Silent:
    def __init__(self) -> None:
        self.finished_trials: dict[int, TrialResult] = {}

    def started(self, number: int, params: Params) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, number: int, result: TrialResult) -> None:
        self.finished_trials[number] = result


def sweep(folder: Path, script: list[Any], log: Log) -> Sweep:
    blank = replace(samples.result(), measurements=(), verdicts=())
    return Sweep(study=study(folder), worker=Stub(script), log=log, watcher=Silent(), blank=lambda _: blank)  # type: ignore[arg-type]


def test_a_sweep_runs_until_its_budget_is_spent_and_records_failures(tmp_path: Path) -> None:
    log = Log()
    made = sweep(tmp_path, [samples.result(), FAILED, samples.result(), samples.result()], log)
    run(made)
    assert [t[0] for t in log.told] == ["begin", "record"] * 4
    assert [e.state for e in made.study.entries()].count("failed") == 1
    assert made.worker.closed  # type: ignore[attr-defined]


def require_the_cut_recipe_is_tried_again(tmp_path: Path, made: Sweep, log: Log) -> None:
    (cut,) = [e for e in made.study.entries() if e.state == "interrupted"]
    assert log.told[-1] == ("kill", cut.number)
    again = Log()
    resumed = sweep(tmp_path, [samples.result()] * 3, again)
    run(resumed)
    assert again.told[1][2] == cut.params
    assert len(resumed.study.finished()) == 4


def test_a_sweep_ended_by_ctrl_c_goes_on_with_the_same_recipe(tmp_path: Path) -> None:
    log = Log()
    made = sweep(tmp_path, [samples.result(), KeyboardInterrupt], log)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    assert made.worker.closed  # type: ignore[attr-defined]
    require_the_cut_recipe_is_tried_again(tmp_path, made, log)


def test_a_cache_that_cannot_be_written_ends_the_sweep_and_costs_no_trial(tmp_path: Path) -> None:
    log = Log()
    full = Failure(stage="build", kind="StoreError", message="cache: stage engine cannot be written. Free space")
    made = sweep(tmp_path, [samples.result(), replace(samples.result(), failure=full)], log)
    with pytest.raises(StoreError, match="stage engine cannot be written"):
        run(made)
    require_the_cut_recipe_is_tried_again(tmp_path, made, log)


def test_a_run_that_a_dead_process_left_open_is_ended(tmp_path: Path) -> None:
    trial, params = study(tmp_path).ask() or pytest.fail("nothing asked")  # and the process dies
    log = Log(left_open=(trial.number,))
    run(sweep(tmp_path, [samples.result()] * 4, log))
    assert log.told[0] == ("kill", trial.number)
    assert log.told[2][2] == params, "its recipe is tried first"


def test_a_process_that_ends_without_an_answer_is_a_failed_trial_with_its_cause(tmp_path: Path) -> None:
    made = sweep(tmp_path, [FAILED] * 4, Log())
    run(made)
    assert [r.failure for r in made.study.finished().values()] == [FAILED] * 4
    assert made.study.ranks() == {}
