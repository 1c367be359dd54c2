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
def test_suggestion_respects_conditions(seed: int) -> None:
    space = SearchSpace.parse(SPACE)
    params = space.suggest(trial(seed))
    space.validate(params)
    assert ("step.quantize.block_size" in params) == (params["recipe"] != "baseline")
    assert ("step.prune.ratio" in params) == (params["recipe"] == "prune_int4")
    assert list(params) == [key for key in SPACE if key in params], "parameters keep the order of the space"


bounds = st.tuples(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6)).map(sorted)


@settings(max_examples=60)
@given(bounds=bounds, log=st.booleans(), seed=st.integers(0, 1000))
def test_suggested_float_stays_in_range(bounds: list[float], log: bool, seed: int) -> None:
    low, high = bounds
    parameter = Parameter.parse("x", {"low": low, "high": high, "log": log})
    value = parameter.suggest(trial(seed))
    assert low <= value <= high
    assert parameter.contains(value)


def test_integer_range_suggests_integers() -> None:
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
def test_parameter_contains_its_proposals(entry: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    parameter = Parameter.parse("x", entry)
    assert [v for v in good if not parameter.contains(v)] == []
    assert [v for v in bad if parameter.contains(v)] == []
    for value in good:
        assert parameter.suggest(trial(fixed={"x": value})) == value, "an enqueued value is proposed unchanged"


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
        {"low": False, "high": True},
        {"low": 0, "high": float("nan")},
        {"low": 0, "high": float("inf")},
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
def test_invalid_parameter_error_names_its_key(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"^search\.parameters\.step\.x"):
        Parameter.parse("step.x", entry)


def test_empty_space_and_later_condition_are_rejected() -> None:
    with pytest.raises(ConfigError, match="at least one parameter"):
        SearchSpace.parse({})
    with pytest.raises(ConfigError, match=r"a\.when: .*listed earlier, got 'b'.*Move b above a"):
        SearchSpace.parse({"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1]}})


def test_examples_cover_every_choice() -> None:
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
def test_enqueued_recipe_outside_the_space_is_rejected(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"search\.enqueue"):
        SearchSpace.parse(SPACE).validate(params)


# properties of random spaces


numbers = st.integers(1, 40) | st.floats(0.001, 50, allow_subnormal=False).map(lambda x: float(f"{x:.9g}"))
choices = st.lists(st.none() | st.text("ab", max_size=2) | st.integers(0, 9), min_size=1, max_size=4, unique=True)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a parameter: choices, or a range of any kind."""
    if draw(st.booleans()):
        return {"choices": draw(choices)}
    low, high = sorted([draw(numbers), draw(numbers)])
    kind = draw(st.sampled_from(["plain", "log", "step"]))
    return {"low": low, "high": high} | {"plain": {}, "log": {"log": True}, "step": {"step": draw(numbers)}}[kind]


@st.composite
def spaces(draw: st.DrawFn, *, finite: bool = False) -> SearchSpace:
    """Draw up to four parameters, some of them conditional on earlier ones."""
    parameters: dict[str, Any] = {}
    for name in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])):
        entry = draw(entries())
        if finite and "low" in entry:
            entry = {"low": int(entry["low"]), "high": int(entry["low"]) + draw(st.integers(0, 6))}
        conditions = [key for key in parameters if "choices" in parameters[key]]
        if conditions and draw(st.booleans()):
            key = draw(st.sampled_from(conditions))
            entry["when"] = {key: draw(st.lists(st.sampled_from(parameters[key]["choices"]), min_size=1, max_size=2))}
        parameters[name] = entry
    return SearchSpace.parse(parameters)


def require_valid(space: SearchSpace, params: Params) -> None:
    """Require a recipe of the space that Optuna accepts."""
    space.validate(params)
    assert list(params) == [p.key for p in space.parameters if p.key in params]
    optuna.trial.create_trial(value=0.0, params=dict(params), distributions=space.distributions(params))


@settings(max_examples=150)
@given(space=spaces(), seed=st.integers(0, 99))
def test_sampled_recipe_is_in_the_space(space: SearchSpace, seed: int) -> None:
    require_valid(space, space.sample(random.Random(seed)))


@settings(max_examples=60)
@given(space=spaces(), seed=st.integers(0, 99))
def test_suggested_recipe_is_in_the_space(space: SearchSpace, seed: int) -> None:
    require_valid(space, space.suggest(trial(seed)))


@settings(max_examples=150)
@given(space=spaces(), seed=st.integers(0, 99))
def test_neighbour_differs_in_one_value(space: SearchSpace, seed: int) -> None:
    rng = random.Random(seed)
    params = space.sample(rng)
    for neighbour in space.neighbours(params, rng):
        require_valid(space, neighbour)
        changed = [key for key in params if key in neighbour and neighbour[key] != params[key]]
        assert len(changed) == 1
        needed = {p.key for p in space.parameters if set(p.when) & {*changed, *(params.keys() ^ neighbour.keys())}}
        assert params.keys() ^ neighbour.keys() <= needed


@settings(max_examples=150)
@given(space=spaces())
def test_example_is_in_the_space(space: SearchSpace) -> None:
    for params in space.examples():
        require_valid(space, params)


@settings(max_examples=150)
@given(space=spaces(finite=True), limit=st.integers(0, 60), seed=st.integers(0, 99))
def test_listed_recipes_are_complete_and_distinct(space: SearchSpace, limit: int, seed: int) -> None:
    expected = list_by_product(space)
    recipes = space.list_recipes(limit)
    assert (recipes is None) == (len(expected) > limit)
    if recipes is not None:
        listed = [canonical_json(params) for params in recipes]
        assert len(listed) == len(set(listed))
        assert set(listed) == expected
        rng = random.Random(seed)
        drawn = space.sample(rng)
        assert {canonical_json(p) for p in [drawn, *space.neighbours(drawn, rng)]} <= expected


def list_by_product(space: SearchSpace) -> set[str]:
    """Return all recipes as JSON: every combination of values, without inactive parameters."""
    sides = [p.choices or tuple(range(int(p.low or 0), int(p.high or 0) + 1)) for p in space.parameters]
    recipes = set()
    for values in itertools.product(*sides):
        params: Params = {}
        for parameter, value in zip(space.parameters, values, strict=True):
            if all(key in params and params[key] in allowed for key, allowed in parameter.when.items()):
                params[parameter.key] = value
        recipes.add(canonical_json(params))
    return recipes


@settings(max_examples=100)
@given(space=spaces(), seed=st.integers(0, 99))
def test_recipes_of_the_search_are_normalized(space: SearchSpace, seed: int) -> None:
    rng = random.Random(seed)
    params = space.sample(rng)
    for recipe in [params, *space.neighbours(params, rng), *space.examples()]:
        assert canonical_json(space.normalize(recipe)) == canonical_json(recipe)
        assert list(space.normalize(dict(reversed(recipe.items())))) == list(recipe)


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
def test_values_are_normalized(entry: dict[str, Any], written: Any, normal: str) -> None:
    assert repr(Parameter.parse("x", entry).normalize(written)) == normal


def test_inactive_parameter_differs_from_null() -> None:
    parameter = Parameter.parse("x", {"choices": [1], "when": {"rounding": None}})
    assert parameter.is_active({"rounding": None})
    assert not parameter.is_active({})


def test_continuous_space_is_not_listed() -> None:
    assert SearchSpace.parse({"x": {"low": 0.0, "high": 1.0}}).list_recipes(10**9) is None


def test_huge_range_is_sampled_without_listing() -> None:
    space = SearchSpace.parse({"x": {"low": 1, "high": 10**12}, "y": {"low": 0.0, "high": 1e3, "step": 1e-3}})
    assert space.list_recipes(20_000) is None
    drawn = [space.sample(random.Random(seed)) for seed in range(5)]
    for params in drawn:
        require_valid(space, params)
    assert len({params["x"] for params in drawn}) == 5


@pytest.mark.parametrize(
    ("entry", "value", "adjacent"),
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
def test_neighbours_are_adjacent_values(entry: dict[str, Any], value: Any, adjacent: list[Any]) -> None:
    assert Parameter.parse("x", entry).neighbours(value) == adjacent


def test_neighbours_add_and_remove_conditional_parameters() -> None:
    space, rng = SearchSpace.parse(SPACE), random.Random(0)
    baseline = list(space.neighbours({"recipe": "baseline"}, rng))
    assert [params["recipe"] for params in baseline] == ["int4", "prune_int4"]
    assert [len(params) for params in baseline] == [2, 4]
    params = {"recipe": "prune_int4", "step.quantize.block_size": 32, "step.prune.ratio": 0.4, "step.prune.windows": 8}
    assert {"recipe": "baseline"} in list(space.neighbours(params, rng))
    assert {"recipe": "int4", "step.quantize.block_size": 32} in list(space.neighbours(params, rng))


@settings(max_examples=40)
@given(entry=entries())
def test_optuna_distribution_matches_the_parameter(entry: dict[str, Any]) -> None:
    parameter = Parameter.parse("x", entry)
    single = SearchSpace.parse({"x": entry})
    for seed in range(5):
        assert parameter.contains(single.suggest(trial(seed))["x"])
    assert single.distributions({}) == {}
    assert set(single.distributions({"x": parameter.endpoints[0]})) == {"x"}


names = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12).map(lambda s: f"k{s}")
values = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | names


@settings(max_examples=60)
@given(value=values | st.lists(st.integers() | names, max_size=3))
def test_hydra_reads_an_override_as_its_value(value: Any) -> None:
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
def test_string_override_stays_a_string(value: str) -> None:
    parsed = OverridesParser.create().parse_override(to_overrides({"step.x": value})[0])
    assert str(parsed.value()) == value
    assert isinstance(parsed.value(), str)
