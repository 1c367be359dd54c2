from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import specs

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.config import parse
from edgeopt.config.parse import compose
from edgeopt.core.config_objects import instantiate
from edgeopt.errors import ConfigError
from edgeopt.search.pareto.front import Objective
from edgeopt.search.space.search_space import SearchSpace, to_overrides
from edgeopt.search.study import Search

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.stem for p in (ROOT / "conf" / "recipe").glob("*.yaml"))
TARGETS = sorted(p.stem for p in (ROOT / "conf" / "target").glob("*.yaml"))
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml"))
OPEN = {
    "local": ["model.path=/m"],
    "hub": ["model.repo=a/b", "model.revision=c"],
    "registry": ["model.uri=models:/m/1"],
}
SPEC = specs.llama(
    vocabulary=4096, hidden=256, intermediate=768, heads=8, kv_heads=4, head_size=32, layers=4, context=512
)


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    return parse.known_metrics()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_with_every_target(recipe: str, target: str, known: dict[str, str]) -> None:
    config = compose([f"recipe={recipe}", f"target={target}"])
    made = parse.recipe(config)
    assert [name for name, _ in made.steps] == config["order"]
    spec = SPEC
    for name, step in made.steps:
        spec = instantiate(step, f"step.{name}").plan(spec)
    assert parse.instantiate_group(config, "target").name == target
    for limit in parse.limits(config, known):
        assert limit.absolute is not None
    for key in ("model", "runtime", "measure", "tracking", "calibration", "evaluation"):
        parse.instantiate_group(config, key)


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("model", "model"),
        ("runtime", "runtime"),
        ("text", "evaluation"),
        ("measure", "measure"),
        ("tracking", "tracking"),
    ],
)
def test_every_choice_of_a_group_composes(group: str, key: str) -> None:
    choices = parse.choices(group)
    assert choices == sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))
    for choice in choices:
        values = OPEN.get(choice, []) if group == "model" else ["evaluation.path=/t.txt"] if choice == "file" else []
        parse.instantiate_group(
            compose([f"{group}={choice}" if group == key else f"{group}@{key}={choice}", *values]), key
        )


ON_ROUNDED_WEIGHTS = ("qat",)
OPEN_SIZES = {"student": ["step.mine.hidden_size=192"]}


@pytest.mark.parametrize("choice", sorted(p.stem for p in (ROOT / "conf" / "step").glob("*.yaml")))
def test_every_step_can_be_added_to_a_recipe(choice: str) -> None:
    config = compose([f"+step@step.mine={choice}", "order=[mine]", *OPEN_SIZES.get(choice, [])])
    (step,) = parse.recipe(config).steps
    rounded = Quantize().plan(SPEC)
    instantiate(step[1], "step.mine").plan(rounded if choice in ON_ROUNDED_WEIGHTS else SPEC)


@pytest.mark.parametrize(
    ("choice", "step", "key"),
    [
        ("activation", "prune_width", "importance"),
        ("taylor", "prune_heads", "importance"),
        ("wanda", "prune_width", "importance"),
        ("block_influence", "prune_depth", "importance@step.mine.importance"),
        ("taylor", "prune_depth", "importance@step.mine.importance"),
    ],
)
def test_every_importance_can_be_chosen_for_its_step(choice: str, step: str, key: str) -> None:
    config = compose([f"+step@step.mine={step}", "order=[mine]", f"{key}={choice}"])
    made = instantiate(config["step"]["mine"], "step.mine")
    assert made.importance == instantiate(yaml.safe_load((ROOT / "conf" / "importance" / f"{choice}.yaml").read_text()))
    made.plan(SPEC)


def test_iterative_pruning_and_its_retraining_can_be_chosen() -> None:
    chosen = ["step@step.mine.prune=prune_depth", "step@step.mine.retrain=lora"]
    config = compose(["+step@step.mine=prune_gradually", "order=[mine]", *chosen])
    made = instantiate(config["step"]["mine"], "step.mine")
    assert len(made.plan(SPEC).layers) == len(SPEC.layers) - 1


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes_and_its_parameters_are_keys_that_exist(name: str, known: dict[str, str]) -> None:
    config = compose(name=name)
    search = parse.instantiate_group(config, "search")
    assert isinstance(search, Search)
    assert parse.limits(config, known)
    for metric, direction in search.objectives.items():
        Objective.parse(metric, direction, known)
    if config["promote"] is not None:
        assert (ROOT / "registry" / f"{config['promote']}.yaml").is_file()
    corners = list(every_corner(SearchSpace.parse(search.parameters)))
    used = {key for params in corners for key in params}
    assert used == search.parameters.keys(), "a parameter that no condition admits is never searched"
    for params in [*map(dict, search.enqueue), *corners]:
        composed = compose(to_overrides(params), name=name)
        spec = SPEC
        for step, description in parse.recipe(composed).steps:
            spec = instantiate(description, f"step.{step}").plan(spec)
        flat = parse.flatten(composed)
        for key, value in params.items():
            assert key in GROUPS or flat[key] == value


GROUPS = ("recipe", "rounding", "runtime")
"""Parameters that choose a file of a group, and are not keys of the config."""


def every_corner(space: SearchSpace) -> Sequence[dict[str, Any]]:
    """Recipes in which every parameter takes its first and its last value."""
    found = []
    first = space.parameters[0]
    for value in first.choices:
        for end in (0, -1):
            params: dict[str, Any] = {first.key: value}
            for parameter in space.parameters[1:]:
                if parameter.is_active(params):
                    params[parameter.key] = (
                        parameter.choices[end] if parameter.choices else (parameter.low, parameter.high)[end]
                    )
            found.append(params)
    return found


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_opens_with_the_command_that_starts_it(name: str) -> None:
    head = (ROOT / "sweeps" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"edgeopt sweep --config-name {name}" in head


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["recipe=prune_lora_int4", "order=[prune,lora]"],
            r"step\.quantize: .*missing from order.*order=\[prune,lora,quantize\]",
        ),
        (["order=[quantize]"], r"order: step 'quantize' is not configured.*\+step@step\.quantize=CHOICE"),
        (["recipe=int4", "order=[quantize,quantize]"], r"order: .*each step once"),
        (["recipe=int4", "order=quantize"], r"order: .*must be a list.*got 'quantize'"),
        (["recipe=int4", "order=null"], r"order: .*must be a list.*got None"),
    ],
)
def test_an_order_that_does_not_fit_the_steps_is_refused(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse.recipe(compose(given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["recipe=in4"], "in4.*int4"),
        (["recipies=int4"], "recipies"),
        (["recipe=int4", "step.quantise.bits=4"], "quantise"),
        (["target.treads=3"], "treads"),
        (["model=local"], r"model\.path"),
        (["recipe=int4", "step.quantize.weights="], r"step\.quantize\.weights"),
        (["state"], "state"),
        (["a=[1"], r"\[1"),
        (["runtime=${nowhere}"], "nowhere"),
        (["state=${nowhere}"], "nowhere"),
    ],
)
def test_what_is_misspelt_is_one_config_error(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        prepared(given)
    assert "\n" not in str(caught.value)


def prepared(given: list[str]) -> list[object]:
    """Target and steps of a config, constructed."""
    config = compose(given)
    steps = [instantiate(step, f"step.{name}") for name, step in parse.recipe(config).steps]
    return [parse.instantiate_group(config, "target"), *steps]


def test_a_config_that_does_not_exist_is_told_by_name() -> None:
    with pytest.raises(ConfigError, match="no_such_sweep"):
        compose(name="no_such_sweep")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["+limits.memory.peak_rss=3 GiB"], r"limits\.memory\.peak_rss: unknown metric.*memory/peak_rss_mib"),
        (["+limits.memory.peak_rss_mib=3"], r"limits\.memory\.peak_rss_mib: the value must have a unit, got 3"),
        (["limits=null"], "limits: .*must be a mapping.*got None"),
        (["limits=3 GiB"], "limits: .*must be a mapping.*got '3 GiB'"),
    ],
)
def test_a_wrong_limit_names_its_key(given: list[str], told: str, known: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=told):
        parse.limits(compose(given), known)


@pytest.mark.parametrize(
    ("given", "absolute"),
    [
        ("limits.quality.regressed_share=0.05", 0.05),
        ("limits.quality.kl_worst_decile=0.2 nats", 0.2),
        ("limits.quality.degenerate_share=10 %", 0.1),
        ("limits.quality.repetition=1.1 x baseline", None),
        ("limits.quality.exact_match=at least 0.5", 0.5),
        ("limits.tasks.accuracy=at least 60 %", 0.6),
    ],
)
def test_tails_are_limited_as_means_are(given: str, absolute: float | None, known: dict[str, str]) -> None:
    (limit,) = parse.limits(compose([given]), known)
    assert limit.metric == given.partition("=")[0].removeprefix("limits.").replace(".", "/")
    assert limit.absolute == (None if absolute is None else pytest.approx(absolute))


def test_an_optional_probe_is_added_with_its_requirements() -> None:
    add = "+probe@measure.probes.tasks=tasks"
    assert "tasks" not in compose()["measure"]["probes"]
    config = compose([add, "measure.probes.tasks.path=/mine", "measure.probes.tasks.names=[a,b]"])
    assert config["measure"]["probes"]["tasks"]["names"] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"measure\.probes\.tasks\.path: a value is required"):
        compose([add])


def test_a_limit_that_is_null_is_taken_away(known: dict[str, str]) -> None:
    before = {x.metric for x in parse.limits(compose(["target=sbc_4gib"]), known)}
    after = {x.metric for x in parse.limits(compose(["target=sbc_4gib", "limits.size.engine_mib=null"]), known)}
    assert before - after == {"size/engine_mib"}


def test_an_override_wins_over_target_and_recipe(known: dict[str, str]) -> None:
    config = compose(
        ["target=sbc_4gib", "recipe=int4", "step.quantize.block_size=64", "limits.memory.peak_rss_mib=1 GiB"]
    )
    assert config["step"]["quantize"]["block_size"] == 64
    assert {x.metric: x.absolute for x in parse.limits(config, known)}["memory/peak_rss_mib"] == 1024.0


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder: a target of its own, another int4, and a sweep."""
    for name, content in {
        "target/gateway.yaml": {"_target_": "edgeopt.core.target.Target", "name": "gateway", "threads": 3},
        "step/int4.yaml": {
            "_target_": "edgeopt.compress.quantization.quantize.Quantize",
            "weights": "int4",
            "block_size": 128,
        },
        "mine.yaml": {"defaults": ["config", "_self_"], "state": "elsewhere"},
    }.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    return tmp_path / "own"


def test_a_users_folder_adds_choices(own: Path) -> None:
    config = compose(["target=gateway", "recipe=int8"], config_dir=own)
    assert parse.instantiate_group(config, "target").threads == 3
    assert config["step"]["quantize"]["weights"] == "int8"
    assert {"gateway", *TARGETS} <= set(parse.choices("target", config_dir=own))
    assert "gateway" not in parse.choices("target")


def test_a_users_file_comes_before_the_one_of_edgeopt(own: Path) -> None:
    assert compose(["recipe=int4"], config_dir=own)["step"]["quantize"]["block_size"] == 128
    assert compose(["recipe=int4"])["step"]["quantize"]["block_size"] == 32


def test_a_users_config_is_composed_by_name(own: Path) -> None:
    assert compose(name="mine", config_dir=own)["state"] == "elsewhere"


def test_a_users_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config-dir"):
        compose(config_dir=tmp_path / "absent")


def test_the_error_for_a_missing_part_names_its_group() -> None:
    with pytest.raises(ConfigError, match=r"search: nothing is configured.*group search"):
        parse.instantiate_group(compose(), "search")


def test_equal_recipes_have_one_digest_whatever_their_steps_are_called() -> None:
    plain = parse.recipe(compose(["recipe=int4"]))
    renamed = parse.recipe(compose(["+step@step.q=int4", "order=[q]"]))
    other = parse.recipe(compose(["recipe=int4", "step.quantize.block_size=64"]))
    assert plain.digest == renamed.digest != other.digest
    original = plain.uncompressed(plain.runtime)
    assert original.digest == parse.recipe(compose(["recipe=baseline"])).digest
    assert (str(plain), str(original)) == ("quantize", "no compression")
