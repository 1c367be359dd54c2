from __future__ import annotations

from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.errors import ConfigError
from edgeopt.search.space import Parameter, Space, overrides

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = {
    "recipe": {"choices": ["baseline", "int4", "prune_int4"]},
    "step.quantize.block_size": {"choices": [32, 64], "when": {"recipe": ["int4", "prune_int4"]}},
    "step.prune.ratio": {"low": 0.1, "high": 0.4, "step": 0.1, "when": {"recipe": "prune_int4"}},
    "step.prune.windows": {"low": 8, "high": 32, "step": 8, "when": {"recipe": "prune_int4"}},
}


def trial(seed: int = 0, fixed: dict[str, Any] | None = None) -> optuna.Trial:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    if fixed is not None:
        study.enqueue_trial(fixed)
    return study.ask()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_what_is_proposed_stands_in_the_space(seed: int) -> None:
    space = Space.parse(SPACE)
    params = space.suggest(trial(seed))
    space.require(params)
    assert ("step.quantize.block_size" in params) == (params["recipe"] != "baseline")
    assert ("step.prune.ratio" in params) == (params["recipe"] == "prune_int4")
    assert list(params) == [key for key in SPACE if key in params], "parameters keep the order of the space"


bounds = st.tuples(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6)).map(sorted)


@settings(max_examples=60)
@given(bounds=bounds, log=st.booleans(), seed=st.integers(0, 1000))
def test_a_value_between_stays_between_and_is_not_rounded_away(bounds: list[float], log: bool, seed: int) -> None:
    low, high = bounds
    parameter = Parameter.parse("x", {"low": low, "high": high, "log": log})
    value = parameter.suggest(trial(seed))
    assert low <= value <= high
    assert parameter.holds(value)


def test_whole_numbers_stay_whole() -> None:
    values = {Parameter.parse("x", {"low": 8, "high": 32, "step": 8}).suggest(trial(seed)) for seed in range(30)}
    assert values == {8, 16, 24, 32}
    assert all(type(value) is int for value in values)


@pytest.mark.parametrize(
    ("entry", "good", "bad"),
    [
        ({"choices": ["a", 2]}, ["a", 2], ["b", 3, None]),
        ({"low": 1, "high": 9, "step": 2}, [1, 5, 9], [0, 2, 11, 3.0, "5", True]),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, [0.1, 0.3, 0.5], [0.05, 0.25, 0.6]),
        ({"low": 0.0, "high": 1.0}, [0, 0.123, 1.0], [-0.1, 1.1, None]),
    ],
)
def test_a_parameter_holds_what_it_could_propose(entry: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    parameter = Parameter.parse("x", entry)
    assert [v for v in good if not parameter.holds(v)] == []
    assert [v for v in bad if parameter.holds(v)] == []
    for value in good:
        assert parameter.suggest(trial(fixed={"x": value})) == value, "what is queued is what is tried"


@pytest.mark.parametrize(
    "entry",
    [
        {"choices": []},
        {"choices": "int4"},
        {"choices": None},
        {"choice": ["a"]},
        {},
        {"low": 1},
        {"low": 2, "high": 1},
        {"low": "a", "high": "b"},
        {"low": 0, "high": 1, "log": True},
        {"low": 1, "high": 9, "log": True, "step": 2},
        {"low": 1, "high": 9, "step": 0},
        {"low": 1, "high": 9, "step": -1},
        {"low": 1, "high": 9, "step": "x"},
        {"choices": ["a"], "when": "recipe"},
        ["a", "b"],
        None,
        3,
    ],
    ids=repr,
)
def test_a_parameter_that_cannot_be_searched_names_its_key(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"^search\.parameters\.step\.x"):
        Parameter.parse("step.x", entry)


def test_an_empty_space_and_a_later_condition_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to search"):
        Space.parse({})
    with pytest.raises(ConfigError, match=r"a\.when: it depends on 'b'.*Move b above a"):
        Space.parse({"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1]}})


def test_examples_stand_in_the_space_and_leave_no_choice_out() -> None:
    space = Space.parse(SPACE)
    examples = space.examples()
    for params in examples:
        space.require(params)
    for parameter in space.parameters:
        assert {params[parameter.key] for params in examples if parameter.key in params} >= set(parameter.ends)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"recipe": "int8"},
        {"recipe": "int4"},
        {"recipe": "int4", "step.quantize.block_size": 16},
        {"recipe": "baseline", "step.quantize.block_size": 32},
        {"recipe": "baseline", "step.typo": 1},
    ],
    ids=str,
)
def test_a_known_recipe_outside_the_space_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"search\.enqueue"):
        Space.parse(SPACE).require(params)


names = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12).map(lambda s: f"k{s}")
values = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | names


@settings(max_examples=60)
@given(value=values | st.lists(st.integers() | names, max_size=3))
def test_hydra_reads_an_override_as_the_value_that_was_proposed(value: Any) -> None:
    written = overrides({"step.x": value})
    parsed = OverridesParser.create().parse_override(written[0])
    assert parsed.key_or_group == "step.x"
    assert parsed.value() == value
    assert type(parsed.value()) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "200 MiB",
        "0.5 x baseline",
        "a=b",
        "32",
        "true",
        "null",
        "1e-3",
        "",
        "it's",
        "a,b",
        "[x]",
        "a\\\\",
        "a\\\\'b",
        "${state}",
        "-x",
    ],
)
def test_text_stays_text_whatever_it_looks_like(value: str) -> None:
    parsed = OverridesParser.create().parse_override(overrides({"step.x": value})[0])
    assert str(parsed.value()) == value
    assert isinstance(parsed.value(), str)
