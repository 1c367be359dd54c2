from __future__ import annotations

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
REQUIRED_VALUES = {
    "model=local": ["model.path=/m"],
    "model=hub": ["model.repo=a/b", "model.revision=c"],
    "model=registry": ["model.uri=models:/m/1"],
    "text=file": ["evaluation.path=/t.txt"],
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
    composed_recipe = parse.recipe(config)
    assert [name for name, _ in composed_recipe.steps] == config["order"]
    spec = SPEC
    for name, step in composed_recipe.steps:
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
def test_every_choice_of_group_composes(group: str, key: str) -> None:
    choices = parse.choices(group)
    assert choices == sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))
    for choice in choices:
        values = REQUIRED_VALUES.get(f"{group}={choice}", [])
        parse.instantiate_group(
            compose([f"{group}={choice}" if group == key else f"{group}@{key}={choice}", *values]), key
        )


STEPS_AFTER_QUANTIZATION = ("qat",)
REQUIRED_STEP_VALUES = {"student": ["step.mine.hidden_size=192"]}


@pytest.mark.parametrize("choice", sorted(p.stem for p in (ROOT / "conf" / "step").glob("*.yaml")))
def test_every_step_can_be_added(choice: str) -> None:
    config = compose([f"+step@step.mine={choice}", "order=[mine]", *REQUIRED_STEP_VALUES.get(choice, [])])
    (step,) = parse.recipe(config).steps
    quantized = Quantize().plan(SPEC)
    instantiate(step[1], "step.mine").plan(quantized if choice in STEPS_AFTER_QUANTIZATION else SPEC)


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
def test_every_importance_can_be_chosen(choice: str, step: str, key: str) -> None:
    config = compose([f"+step@step.mine={step}", "order=[mine]", f"{key}={choice}"])
    pruning = instantiate(config["step"]["mine"], "step.mine")
    expected = yaml.safe_load((ROOT / "conf" / "importance" / f"{choice}.yaml").read_text())
    assert pruning.importance == instantiate(expected)
    pruning.plan(SPEC)


def test_steps_of_gradual_pruning_can_be_chosen() -> None:
    chosen = ["step@step.mine.prune=prune_depth", "step@step.mine.retrain=lora"]
    config = compose(["+step@step.mine=prune_gradually", "order=[mine]", *chosen])
    pruning = instantiate(config["step"]["mine"], "step.mine")
    assert len(pruning.plan(SPEC).layers) == len(SPEC.layers) - 1


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_sets_existing_keys(name: str, known: dict[str, str]) -> None:
    config = compose(name=name)
    search = parse.instantiate_group(config, "search")
    assert isinstance(search, Search)
    assert parse.limits(config, known)
    for metric, direction in search.objectives.items():
        Objective.parse(metric, direction, known)
    if config["promote"] is not None:
        assert (ROOT / "registry" / f"{config['promote']}.yaml").is_file()
    corners = corner_recipes(SearchSpace.parse(search.parameters))
    used = {key for params in corners for key in params}
    assert used == search.parameters.keys(), "every parameter is active in some recipe"
    for params in [*map(dict, search.enqueue), *corners]:
        composed = compose(to_overrides(params), name=name)
        spec = SPEC
        for step_name, step in parse.recipe(composed).steps:
            spec = instantiate(step, f"step.{step_name}").plan(spec)
        flat = parse.flatten(composed)
        for key, value in params.items():
            assert key in GROUPS or flat[key] == value


GROUPS = ("recipe", "rounding", "runtime")
"""Parameters that choose a file of a group and are not keys of the config."""


def corner_recipes(space: SearchSpace) -> list[dict[str, Any]]:
    """Return two recipes for each choice of the first parameter.

    The other active parameters have their first values in one recipe and their last values in the other.
    """
    recipes = []
    first = space.parameters[0]
    for value in first.choices:
        for end in (0, -1):
            params: dict[str, Any] = {first.key: value}
            for parameter in space.parameters[1:]:
                if parameter.is_active(params):
                    params[parameter.key] = (
                        parameter.choices[end] if parameter.choices else (parameter.low, parameter.high)[end]
                    )
            recipes.append(params)
    return recipes


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_file_shows_its_command(name: str) -> None:
    head = (ROOT / "sweeps" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"edgeopt sweep --config-name {name}" in head


@pytest.mark.parametrize(
    ("overrides", "message"),
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
def test_order_must_match_the_steps(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse.recipe(compose(overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
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
def test_invalid_override_is_one_line_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_objects(overrides)
    assert "\n" not in str(caught.value)


def build_objects(overrides: list[str]) -> list[object]:
    """Return the target and the steps of a config."""
    config = compose(overrides)
    steps = [instantiate(step, f"step.{name}") for name, step in parse.recipe(config).steps]
    return [parse.instantiate_group(config, "target"), *steps]


def test_missing_config_error_names_config() -> None:
    with pytest.raises(ConfigError, match="no_such_sweep"):
        compose(name="no_such_sweep")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+limits.memory.peak_rss=3 GiB"], r"limits\.memory\.peak_rss: unknown metric.*memory/peak_rss_mib"),
        (["+limits.memory.peak_rss_mib=3"], r"limits\.memory\.peak_rss_mib: the value must have a unit, got 3"),
        (["limits=null"], "limits: .*must be a mapping.*got None"),
        (["limits=3 GiB"], "limits: .*must be a mapping.*got '3 GiB'"),
    ],
)
def test_invalid_limit_names_its_key(overrides: list[str], message: str, known: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=message):
        parse.limits(compose(overrides), known)


@pytest.mark.parametrize(
    ("override", "absolute"),
    [
        ("limits.quality.regressed_share=0.05", 0.05),
        ("limits.quality.kl_worst_decile=0.2 nats", 0.2),
        ("limits.quality.degenerate_share=10 %", 0.1),
        ("limits.quality.repetition=1.1 x baseline", None),
        ("limits.quality.exact_match=at least 0.5", 0.5),
        ("limits.tasks.accuracy=at least 60 %", 0.6),
    ],
)
def test_tail_and_task_metrics_can_be_limited(override: str, absolute: float | None, known: dict[str, str]) -> None:
    (limit,) = parse.limits(compose([override]), known)
    assert limit.metric == override.partition("=")[0].removeprefix("limits.").replace(".", "/")
    assert limit.absolute == (None if absolute is None else pytest.approx(absolute))


def test_optional_probe_requires_its_values() -> None:
    add = "+probe@measure.probes.tasks=tasks"
    assert "tasks" not in compose()["measure"]["probes"]
    config = compose([add, "measure.probes.tasks.path=/mine", "measure.probes.tasks.names=[a,b]"])
    assert config["measure"]["probes"]["tasks"]["names"] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"measure\.probes\.tasks\.path: a value is required"):
        compose([add])


def test_null_removes_a_limit(known: dict[str, str]) -> None:
    before = {x.metric for x in parse.limits(compose(["target=sbc_4gib"]), known)}
    after = {x.metric for x in parse.limits(compose(["target=sbc_4gib", "limits.size.engine_mib=null"]), known)}
    assert before - after == {"size/engine_mib"}


def test_override_has_priority_over_target_and_recipe(known: dict[str, str]) -> None:
    config = compose(
        ["target=sbc_4gib", "recipe=int4", "step.quantize.block_size=64", "limits.memory.peak_rss_mib=1 GiB"]
    )
    assert config["step"]["quantize"]["block_size"] == 64
    assert {x.metric: x.absolute for x in parse.limits(config, known)}["memory/peak_rss_mib"] == 1024.0


@pytest.fixture
def user_configs(tmp_path: Path) -> Path:
    """Return a user's config folder with a new target, a replacement of the step int4, and a top-level config."""
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


def test_user_folder_adds_choices(user_configs: Path) -> None:
    config = compose(["target=gateway", "recipe=int8"], config_dir=user_configs)
    assert parse.instantiate_group(config, "target").threads == 3
    assert config["step"]["quantize"]["weights"] == "int8"
    assert {"gateway", *TARGETS} <= set(parse.choices("target", config_dir=user_configs))
    assert "gateway" not in parse.choices("target")


def test_user_file_replaces_edgeopt_file(user_configs: Path) -> None:
    assert compose(["recipe=int4"], config_dir=user_configs)["step"]["quantize"]["block_size"] == 128
    assert compose(["recipe=int4"])["step"]["quantize"]["block_size"] == 32


def test_user_config_is_composed_by_name(user_configs: Path) -> None:
    assert compose(name="mine", config_dir=user_configs)["state"] == "elsewhere"


def test_missing_user_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config-dir"):
        compose(config_dir=tmp_path / "absent")


def test_missing_config_object_error_names_group() -> None:
    with pytest.raises(ConfigError, match=r"search: nothing is configured.*group search"):
        parse.instantiate_group(compose(), "search")


def test_recipe_digest_ignores_step_names() -> None:
    plain = parse.recipe(compose(["recipe=int4"]))
    renamed = parse.recipe(compose(["+step@step.q=int4", "order=[q]"]))
    other = parse.recipe(compose(["recipe=int4", "step.quantize.block_size=64"]))
    assert plain.digest == renamed.digest != other.digest
    original = plain.uncompressed(plain.runtime)
    assert original.digest == parse.recipe(compose(["recipe=baseline"])).digest
    assert (str(plain), str(original)) == ("quantize", "no compression")
