"""Check the errors of invalid configs, in overrides and in files of the user."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeopt.cli.main import main
from edgeopt.config import assemble, parse, trial_process
from edgeopt.errors import ConfigError

from .conftest import ErrorOf

CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key of a step": (
        ["recipe=prune", "step.prune.ratoi=0.2"],
        ["step.prune.ratoi: ", "Did you mean step.prune.ratio?"],
    ),
    "misspelt group": (["recpie=int4"], ["recpie: ", "Did you mean recipe?"]),
    "misspelt first part of a key": (["modle.path=x"], ["modle.path: ", "Did you mean model.path?"]),
    "misspelt choice": (["recipe=prune_lora_in4"], ["recipe: ", "Did you mean prune_lora_int4?", "baseline"]),
    "misspelt deletion": (["~limitz"], ["limitz: ", "Did you mean limits?"]),
    "misspelt group of the defaults list": (["txt@calibration=file"], ["txt", "Did you mean text?"]),
    "key of a step that the recipe lacks": (["recipe=int4", "step.prune.ratio=0.1"], ["step has: quantize"]),
    "unknown key without a similar one": (["zzz=1"], ["zzz: there is no such key", "limits"]),
    "added key that is not read": (["+zzz=1"], ["zzz: edgeopt does not read this key"]),
    "step without +": (["step@step.q=int4"], ["Add it by +step@step.q=CHOICE"]),
    "override without =": (["int4"], ["key=value, got 'int4'", "key=value"]),
    "invalid override": (["recipe=[a"], ["'recipe=[a' cannot be parsed", "quote"]),
    "unquoted =": (["state=a=b"], ["'state=a=b' cannot be parsed", "quote"]),
    "runtime without predictions": (["runtime=torch"], ["runtime: ", "Torch", "edgeopt run"]),
    "two choices": (["recipe=int4,int8"], ["recipe=int4,int8", "one value"]),
    "no choice": (["model=null"], ["model=null: ", "GROUP=CHOICE"]),
    "missing value": (["model=local"], ["model.path: a value is required", "model.path="]),
    "deleted required key": (["~model"], ["model: a required key is missing"]),
    "unknown interpolation": (["limits.memory.peak_rss_mib=${nope}"], ["limits.memory.peak_rss_mib: ", "'nope'"]),
    "no state": (["state=null"], ["state: `state` must be the path of a folder", "got None"]),
    "cache limit without unit": (["cache.limit=20"], ["cache.limit: the value must have a unit, got 20", "GiB"]),
    "cache limit below zero": (
        ["cache.limit=-1 GiB"],
        ["cache.limit: the size must not be negative, got '-1 GiB'", "0 B or more"],
    ),
    "cache limit that is not a quantity": (
        ["cache.limit=[1]"],
        ["cache.limit: the value must be a quantity, got [1]", "GiB"],
    ),
    "cache limit of another dimension": (
        ["cache.limit=3 ms"],
        ["cache.limit: the value must have a unit of size, got '3 ms'", "GiB"],
    ),
    "misspelt cache limit": (["cache.limt=3 GiB"], ["cache.limt: ", "Did you mean cache.limit?"]),
    "cache that is not a mapping": (["cache=3"], ["cache: `cache` must be a mapping", "Set cache.limit"]),
    "unknown metric": (
        ["limits.memory.peek_rss_mib=3 GiB"],
        ["unknown metric 'memory/peek_rss_mib'", "Did you mean memory/peak_rss_mib?"],
    ),
    "unknown metric in a target": (
        ["target=sbc_4gib", "limits.size.engine=3 GiB"],
        ["limits.size.engine: ", "size/engine_mib"],
    ),
    "limit without unit": (
        ["limits.memory.peak_rss_mib=3000"],
        ["limits.memory.peak_rss_mib: the value must have a unit, got 3000", "GiB"],
    ),
    "limit with an unknown unit": (["limits.memory.peak_rss_mib=3 GoB"], ["'3 GoB'", "GiB"]),
    "limit of another dimension": (
        ["limits.memory.peak_rss_mib=3 ms"],
        ["must have a unit of size, got '3 ms' with a unit of time", "GiB"],
    ),
    "limit that is not a quantity": (["limits.memory.peak_rss_mib=lots"], ["must be a quantity, got 'lots'", "GiB"]),
    "limit below zero": (["limits.memory.peak_rss_mib=-3 MiB"], ["the limit must be above 0, got '-3 MiB'"]),
    "limits that are not a mapping": (["limits=3"], ["limits: `limits` must be a mapping", "got 3"]),
    "ratio above 1": (
        ["recipe=prune", "step.prune.ratio=1.5"],
        ["step.prune.ratio: ", "must be between 0 and 1, got 1.5"],
    ),
    "ratio of 0": (
        ["recipe=heads_int4", "step.prune.ratio=0.0"],
        ["step.prune.ratio: ", "must be between 0 and 1, got 0.0"],
    ),
    "ratio that is text": (
        ["recipe=prune", "step.prune.ratio=abc"],
        ["step.prune.ratio: `ratio` must be a number, got 'abc'"],
    ),
    "rank above 64": (
        ["recipe=prune_lora", "step.lora.rank=99"],
        ["step.lora.rank: `rank` must be from 2 to 64, got 99"],
    ),
    "rank below 2": (
        ["recipe=prune_lora", "step.lora.rank=1"],
        ["step.lora.rank: `rank` must be from 2 to 64, got 1."],
    ),
    "unsupported block size": (
        ["recipe=int4", "step.quantize.block_size=48"],
        ["step.quantize.block_size: ", "must be one of 16, 32"],
    ),
    "block size that does not divide the matrix side": (
        ["recipe=prune_int4", "step.quantize.block_size=256", "step.prune.multiple=32", "step.prune.ratio=0.2"],
        ["step.quantize.block_size: `block_size` must divide the matrix side", "16, 32"],
    ),
    "unknown rounding": (["recipe=int4", "rounding=gtpq"], ["rounding: ", "Did you mean gptq?"]),
    "rounding by name inside a step": (
        ["recipe=int4", "step.quantize.rounding=gptq"],
        ["step.quantize.rounding: `rounding` must be a mapping", "got 'gptq'", "rounding=gptq"],
    ),
    "pattern that matches no unit": (
        ["recipe=int4", "step.quantize.overrides={layers.9.*: int8}"],
        ["step.quantize.overrides: no unit matches the pattern 'layers.9.*'", "layers.3.down"],
    ),
    "unknown type of weights": (
        ["recipe=int4", "step.quantize.overrides={*.qkv: int3}"],
        ["step.quantize.overrides.*.qkv: ", "float, int2, int4, int8; got 'int3'"],
    ),
    "lora after quantize": (
        ["recipe=prune_lora_int4", "order=[prune,quantize,lora]"],
        ["order: lora cannot follow quantize", "Put lora before quantize"],
    ),
    "step that is not in order": (
        ["recipe=prune_lora_int4", "order=[prune,quantize]"],
        ["step.lora: ", "order=[prune,quantize,lora]"],
    ),
    "order with a step that is not configured": (["recipe=int4", "order=[prune,quantize]"], ["order: step 'prune'"]),
    "misspelt step in order": (["recipe=int4", "order=[quantise]"], ["order: ", "Did you mean quantize?"]),
    "misspelt package of a step": (["recipe=int4", "step@step.quantise=int8"], ["Did you mean step@step.quantize?"]),
    "order that is not a list": (["order=3"], ["order: `order` must be a list", "got 3"]),
    "foreign target": (["+step.a={_target_:os.system,command:ls}", "order=[a]"], ["step.a: ", "'os.system'"]),
    "missing task folder": (
        ["+probe@measure.probes.tasks=tasks", "measure.probes.tasks.path=/absent", "measure.probes.tasks.names=[a]"],
        ["measure.probes.tasks", "/absent" if find_spec("lm_eval") else "pip install 'edgeopt[tasks]'"],
    ),
    "probe that is a number": (["measure.probes.size=3"], ["measure.probes.size: `_target_` must be a probe, got int"]),
    "affinity that is not a list of processors": (
        ["runtime.affinity=big"],
        ["runtime.affinity: `affinity` must be a list of processors, got 'big'", "0,2 or 4-7"],
    ),
    "unknown graph optimization": (
        ["runtime.graph_optimization=most"],
        ["runtime.graph_optimization: `graph_optimization` must be one of all, extended, basic, none; got 'most'"],
    ),
    "missing folder of configs": (
        ["--config-dir", "nope"],
        ["--config-dir: `--config-dir` must be a folder, got 'nope'"],
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_bad_config_is_rejected(case: str, error_of: ErrorOf, work: Path) -> None:
    overrides, expected = CONFIG[case]
    line = error_of("predict", *overrides)
    assert [part for part in expected if part not in line] == [], line
    assert list(work.iterdir()) == [], "a rejected command writes no files"


@pytest.fixture
def user_configs(work: Path) -> Path:
    """Return a user's config folder in which every file has one error."""
    for name, content in {
        "step/narrow.yaml": "_target_: edgeopt.compress.pruning.prune_width.PruneWidth\nratoi: 0.2\n",
        "step/syntax.yaml": "a: [1\nb: 2\n",
        "step/evil.yaml": "_target_: os.system\ncommand: touch pwned\n",
        "step/list.yaml": "- 1\n",
        "recipe/narrow.yaml": "# @package _global_\ndefaults:\n  - /step@step.prune: narrow\norder: [prune]\n",
        "recipe/absent.yaml": "# @package _global_\ndefaults:\n  - /step@step.prune: narow\norder: [prune]\n",
        "target/capped.yaml": "_target_: edgeopt.core.target.Target\nname: capped\nmemory_cap: 3 ms\n",
        "cached.yaml": "defaults: [config, _self_]\ncache:\n  limit: 3 ms\n",
        "target/typo.yaml": "# @package _global_\nlimit:\n  size:\n    engine_mib: 3 GiB\n",
    }.items():
        (work / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "own" / name).write_text(content)
    return work / "own"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["recipe=narrow"], ["step.prune.ratoi: ", "Did you mean ratio?", "own/step/narrow.yaml:2"]),
        (["recipe=absent"], ["own/recipe/absent.yaml: ", "'narow'", "Did you mean narrow?"]),
        (["+step@step.a=syntax"], ["own/step/syntax.yaml:2: invalid YAML"]),
        (["+step@step.a=evil", "order=[a]"], ["step.a: ", "'os.system'", "edgeopt.plugins"]),
        (["+step@step.a=list", "order=[a]"], ["step.a: `a` must be a mapping with the key `_target_`, got [1]"]),
        (["target=capped"], ["target.memory_cap: ", "3 ms", "own/target/capped.yaml:3"]),
        (["--config-name", "cached"], ["cache.limit: ", "3 ms", "own/cached.yaml:3"]),
        (["target=typo"], ["limit: ", "Did you mean limits?", "own/target/typo.yaml:2"]),
    ],
)
def test_error_in_user_file_names_the_file(
    overrides: list[str], expected: list[str], error_of: ErrorOf, user_configs: Path, work: Path
) -> None:
    line = error_of("predict", "--config-dir", "own", *overrides)
    assert [part for part in expected if part not in line] == [], line
    assert not (work / "pwned").exists()


def test_error_in_override_names_no_file(error_of: ErrorOf, user_configs: Path) -> None:
    content = "_target_: edgeopt.compress.pruning.prune_width.PruneWidth\nratio: 0.2\n"
    (user_configs / "step" / "wide.yaml").write_text(content)
    line = error_of("predict", "--config-dir", "own", "recipe=prune", "step.prune.ratio=7.0")
    assert line.startswith("step.prune.ratio: `ratio` must be between 0 and 1, got 7.0")
    assert "wide.yaml" not in line


def test_invalid_trial_values_are_recorded_as_failure() -> None:
    for params, expected in (({"step.quantize.bits": 4}, "step.quantize.bits"), ({"recipe": "int5"}, "'int5'")):
        result = trial_process.evaluate_trial(assemble.Request(), params, lambda _: None)
        assert result.failure is not None
        assert (result.failure.stage, result.failure.kind, result.feasible) == ("config", "ConfigError", False)
        assert expected in result.failure.message


@pytest.mark.parametrize(
    "key", ["limits.memory.peak_rss_mib", "++limits.memory.peak_rss_mib", "limits.memory/peak_rss_mib"]
)
def test_limit_without_default_can_be_set(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("this_machine", "sbc_4gib"):
        assert main(["predict", f"target={target}", f"{key}=3 GiB", "--json"]) == 0
        (limit,) = [x for x in json.loads(capsys.readouterr().out)["limits"] if x["metric"].startswith("memory")]
        assert limit["limit"] == "at most 3072 MiB"


def test_added_key_may_begin_with_underscore() -> None:
    config = parse.compose(["+_bits=64", "recipe=int4", "step.quantize.block_size=${_bits}"])
    assert config["step"]["quantize"]["block_size"] == 64


def test_unknown_field_error_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"target\.treads: .*Did you mean threads\?"):
        parse.instantiate_group(
            {"target": {"_target_": "edgeopt.core.target.Target", "name": "a", "treads": 2}}, "target"
        )
