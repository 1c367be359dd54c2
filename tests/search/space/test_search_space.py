from __future__ import annotations

import itertools
import random
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.core.config_objects import canonical_json
from edgeopt.errors import ConfigError
from edgeopt.search.space.parameter import Parameter, Params
from edgeopt.search.space.search_space import SearchSpace, to_overrides

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
    space = SearchSpace.parse(SPACE)
    params = space.suggest(trial(seed))
    space.validate(params)
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
    assert parameter.contains(value)


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
    assert [v for v in good if not parameter.contains(v)] == []
    assert [v for v in bad if parameter.contains(v)] == []
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
    with pytest.raises(ConfigError, match="at least one parameter"):
        SearchSpace.parse({})
    with pytest.raises(ConfigError, match=r"a\.when: .*listed earlier, got 'b'.*Move b above a"):
        SearchSpace.parse({"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1]}})


def test_examples_stand_in_the_space_and_leave_no_choice_out() -> None:
    space = SearchSpace.parse(SPACE)
    examples = space.examples()
    for params in examples:
        space.validate(params)
    for parameter in space.parameters:
        assert {params[parameter.key] for params in examples if parameter.key in params} >= set(parameter.endpoints)


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
        SearchSpace.parse(SPACE).validate(params)


# whatever the space


numbers = st.integers(1, 40) | st.floats(0.001, 50, allow_subnormal=False).map(lambda x: float(f"{x:.9g}"))
choices = st.lists(st.none() | st.text("ab", max_size=2) | st.integers(0, 9), min_size=1, max_size=4, unique=True)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """A parameter: choices, or a range of any kind."""
    if draw(st.booleans()):
        return {"choices": draw(choices)}
    low, high = sorted([draw(numbers), draw(numbers)])
    kind = draw(st.sampled_from(["plain", "log", "step"]))
    return {"low": low, "high": high} | {"plain": {}, "log": {"log": True}, "step": {"step": draw(numbers)}}[kind]


@st.composite
def spaces(draw: st.DrawFn, *, finite: bool = False) -> SearchSpace:
    """Up to four parameters, some of which exist only for values of those before them."""
    found: dict[str, Any] = {}
    for name in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])):
        entry = draw(entries())
        if finite and "low" in entry:
            entry = {"low": int(entry["low"]), "high": int(entry["low"]) + draw(st.integers(0, 6))}
        above = [key for key in found if "choices" in found[key]]
        if above and draw(st.booleans()):
            key = draw(st.sampled_from(above))
            entry["when"] = {key: draw(st.lists(st.sampled_from(found[key]["choices"]), min_size=1, max_size=2))}
        found[name] = entry
    return SearchSpace.parse(found)


def require_told(space: SearchSpace, params: Params) -> None:
    """It is a recipe of the space, which Optuna takes too."""
    space.validate(params)
    assert list(params) == [p.key for p in space.parameters if p.key in params]
    optuna.trial.create_trial(value=0.0, params=dict(params), distributions=space.distributions(params))


@settings(max_examples=150)
@given(space=spaces(), seed=st.integers(0, 99))
def test_every_recipe_that_is_drawn_stands_in_the_space(space: SearchSpace, seed: int) -> None:
    require_told(space, space.sample(random.Random(seed)))


@settings(max_examples=60)
@given(space=spaces(), seed=st.integers(0, 99))
def test_every_recipe_that_is_suggested_stands_in_the_space(space: SearchSpace, seed: int) -> None:
    require_told(space, space.suggest(trial(seed)))


@settings(max_examples=150)
@given(space=spaces(), seed=st.integers(0, 99))
def test_every_neighbour_stands_in_the_space_and_differs_in_one_value(space: SearchSpace, seed: int) -> None:
    chance = random.Random(seed)
    params = space.sample(chance)
    for near in space.neighbours(params, chance):
        require_told(space, near)
        changed = [key for key in params if key in near and near[key] != params[key]]
        assert len(changed) == 1
        needed = {p.key for p in space.parameters if set(p.when) & {*changed, *(params.keys() ^ near.keys())}}
        assert params.keys() ^ near.keys() <= needed


@settings(max_examples=150)
@given(space=spaces())
def test_every_example_stands_in_the_space(space: SearchSpace) -> None:
    for params in space.examples():
        require_told(space, params)


@settings(max_examples=150)
@given(space=spaces(finite=True), limit=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_space_is_listed_whole_and_each_recipe_once(space: SearchSpace, limit: int, seed: int) -> None:
    expected = product(space)
    found = space.list_recipes(limit)
    assert (found is None) == (len(expected) > limit)
    if found is not None:
        listed = [canonical_json(params) for params in found]
        assert len(listed) == len(set(listed))
        assert set(listed) == expected
        chance = random.Random(seed)
        drawn = space.sample(chance)
        assert {canonical_json(p) for p in [drawn, *space.neighbours(drawn, chance)]} <= expected


def product(space: SearchSpace) -> set[str]:
    """All recipes: every combination of values, without those of parameters that do not exist then."""
    sides = [p.choices or tuple(range(int(p.low or 0), int(p.high or 0) + 1)) for p in space.parameters]
    found = set()
    for values in itertools.product(*sides):
        params: Params = {}
        for parameter, value in zip(space.parameters, values, strict=True):
            if all(key in params and params[key] in allowed for key, allowed in parameter.when.items()):
                params[parameter.key] = value
        found.add(canonical_json(params))
    return found


@settings(max_examples=100)
@given(space=spaces(), seed=st.integers(0, 99))
def test_a_recipe_of_the_search_is_in_its_normal_form(space: SearchSpace, seed: int) -> None:
    chance = random.Random(seed)
    params = space.sample(chance)
    for found in [params, *space.neighbours(params, chance), *space.examples()]:
        assert canonical_json(space.normalize(found)) == canonical_json(found)
        assert list(space.normalize(dict(reversed(found.items())))) == list(found)


@pytest.mark.parametrize(
    ("entry", "written", "normal"),
    [
        ({"low": 0.0, "high": 2.0}, 1, "1.0"),
        ({"low": 0, "high": 1, "step": 0.1}, 0.1 + 0.2, "0.3"),
        ({"low": 0, "high": 1, "step": 0.1}, 0, "0.0"),
        ({"choices": [0.5, 1.0]}, 1, "1.0"),
        ({"low": 0, "high": 9}, 4, "4"),
    ],
)
def test_the_same_value_is_written_in_one_way(entry: dict[str, Any], written: Any, normal: str) -> None:
    assert repr(Parameter.parse("x", entry).normalize(written)) == normal


def test_a_parameter_that_does_not_exist_has_no_value_and_not_null() -> None:
    parameter = Parameter.parse("x", {"choices": [1], "when": {"rounding": None}})
    assert parameter.is_active({"rounding": None})
    assert not parameter.is_active({})


def test_a_space_of_a_range_without_steps_is_not_listed() -> None:
    assert SearchSpace.parse({"x": {"low": 0.0, "high": 1.0}}).list_recipes(10**9) is None


def test_a_huge_range_is_drawn_from_and_not_listed() -> None:
    space = SearchSpace.parse({"x": {"low": 1, "high": 10**12}, "y": {"low": 0.0, "high": 1e3, "step": 1e-3}})
    assert space.list_recipes(20_000) is None
    drawn = [space.sample(random.Random(seed)) for seed in range(5)]
    for params in drawn:
        require_told(space, params)
    assert len({params["x"] for params in drawn}) == 5


@pytest.mark.parametrize(
    ("entry", "value", "near"),
    [
        ({"choices": ["a", "b", "c"]}, "b", ["a", "c"]),
        ({"choices": [128, 32, 64]}, 64, [32, 128]),
        ({"choices": [128, 32, 64]}, 32, [64]),
        ({"choices": [True, False]}, True, [False]),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, 0.3, [0.2, 0.4]),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, 0.1, [0.2]),
        ({"low": 0.0, "high": 1.0}, 0.5, [0.4, 0.6]),
        ({"low": 0.0, "high": 1.0}, 0.95, [0.85, 1.0]),
        ({"low": 1, "high": 100}, 50, [40, 60]),
        ({"low": 1, "high": 5}, 3, [2, 4]),
        ({"low": 1, "high": 4, "log": True}, 2, [1, 3]),
        ({"low": 1.0, "high": 1024.0, "log": True}, 32.0, [16.0, 64.0]),
        ({"low": 3, "high": 3}, 3, []),
    ],
)
def test_neighbours_are_the_values_next_to_one(entry: dict[str, Any], value: Any, near: list[Any]) -> None:
    assert Parameter.parse("x", entry).neighbours(value) == near


def test_neighbours_bring_and_drop_what_exists_with_them() -> None:
    space, chance = SearchSpace.parse(SPACE), random.Random(0)
    baseline = list(space.neighbours({"recipe": "baseline"}, chance))
    assert [params["recipe"] for params in baseline] == ["int4", "prune_int4"]
    assert [len(params) for params in baseline] == [2, 4]
    whole = {"recipe": "prune_int4", "step.quantize.block_size": 32, "step.prune.ratio": 0.4, "step.prune.windows": 8}
    assert {"recipe": "baseline"} in list(space.neighbours(whole, chance))
    assert {"recipe": "int4", "step.quantize.block_size": 32} in list(space.neighbours(whole, chance))


@settings(max_examples=40)
@given(entry=entries())
def test_optuna_knows_the_same_parameter(entry: dict[str, Any]) -> None:
    parameter = Parameter.parse("x", entry)
    single = SearchSpace.parse({"x": entry})
    for seed in range(5):
        assert parameter.contains(single.suggest(trial(seed))["x"])
    assert set(single.distributions({})) == set()
    assert set(single.distributions({"x": parameter.endpoints[0]})) == {"x"}


names = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12).map(lambda s: f"k{s}")
values = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | names


@settings(max_examples=60)
@given(value=values | st.lists(st.integers() | names, max_size=3))
def test_hydra_reads_an_override_as_the_value_that_was_proposed(value: Any) -> None:
    written = to_overrides({"step.x": value})
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
    parsed = OverridesParser.create().parse_override(to_overrides({"step.x": value})[0])
    assert str(parsed.value()) == value
    assert isinstance(parsed.value(), str)
