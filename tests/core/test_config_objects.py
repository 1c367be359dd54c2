from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.config_objects import canonical_json, digest, instantiate, to_config
from edgeopt.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


def find_configs(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping with a `_target_` and without missing values (`???`), named by file and target."""
    if not isinstance(node, dict):
        return
    if "_target_" in node and "???" not in node.values():
        yield f"{name}:{node['_target_']}", {k: v for k, v in node.items() if k != "defaults"}
        return
    for value in node.values():
        yield from find_configs(value, name)


def restrict(data: Any, to: Any) -> Any:
    """Return `data` with only the keys of `to`, in nested mappings too."""
    return {k: restrict(data[k], v) for k, v in to.items()} if isinstance(to, dict) else data


def resolve_interpolations(text: str) -> str:
    """Replace the interpolations of values from other files of conf/."""
    text = text.replace("${oc.select:target.kernels,null}", "null")
    text = text.replace("${importance}", "{_target_: edgeopt.compress.pruning.taylor.Taylor}")
    return text.replace("${rounding}", "{_target_: edgeopt.compress.quantization.rtn.Rtn}")


def is_complete(text: str) -> bool:
    """Return whether a file of conf/ sets every required field. test_config.py composes the other files."""
    return "probes." not in text and "/step@retrain" not in text


IN_CONF = [
    named_config
    for path in sorted(CONF.rglob("*.yaml"))
    if is_complete(path.read_text())
    for named_config in find_configs(
        yaml.safe_load(resolve_interpolations(path.read_text())), path.relative_to(CONF).as_posix()
    )
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
TARGET = {"_target_": "edgeopt.core.target.Target", "name": "box"}
LORA = {"_target_": "edgeopt.compress.recovery.lora.Lora"}


def test_conf_contains_config_objects() -> None:
    assert len(IN_CONF) > 20


@pytest.mark.parametrize("data", [d for _, d in IN_CONF], ids=[n for n, _ in IN_CONF])
def test_config_round_trip_preserves_object(data: dict[str, Any]) -> None:
    config_object = instantiate(data)
    again = to_config(config_object)
    assert json.loads(json.dumps(again)) == again, "a config is plain JSON"
    assert again["_target_"] == data["_target_"]
    assert restrict(again, data) == data, "the object has the values of the file"
    assert instantiate(again) == config_object
    assert to_config(instantiate(again)) == again
    assert digest(to_config(instantiate(again))) == digest(again)


def test_nested_round_trip_preserves_object() -> None:
    device = {
        "_target_": "edgeopt.core.target.Device",
        "name": "d",
        "cpu": "c",
        "cores": 2,
        "ram_bytes": 10,
        "isa": ["neon"],
    }
    target = instantiate({**TARGET, "device": device})
    assert target.device.isa == ("neon",)
    assert instantiate(to_config(target)) == target


@given(data=JSON)
def test_canonical_json_is_unique(data: Any) -> None:
    text = canonical_json(data)
    assert json.loads(text) == data
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_digest_ignores_key_order(data: dict[str, int]) -> None:
    assert digest(dict(reversed(data.items()))) == digest(data)


def test_digest_is_stable_across_processes() -> None:
    data = {"b": [1, 2.5, None, "é"], "a": True}
    code = f"from edgeopt.core.config_objects import digest; print(digest({data!r}))"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == digest(data)


INVALID = {
    "no target": ({"name": "box"}, "", "_target_"),
    "target is a number": ({"_target_": 3}, "", "_target_"),
    "unknown key": (
        {**TARGET, "treads": 2},
        "target",
        r"target\.treads: `treads` is not a field of Target\. Did you mean threads\?",
    ),
    "foreign target": ({"_target_": "os.system", "command": "true"}, "step.x", "must name a class of edgeopt"),
    "foreign target with similar prefix": ({"_target_": "edgeopt_evil.X"}, "step.x", "must name a class of edgeopt"),
    "missing module": ({"_target_": "edgeopt.nowhere.X"}, "step.x", "cannot be imported"),
    "missing class": ({"_target_": "edgeopt.core.target.X"}, "step.x", "cannot be imported"),
    "function": ({"_target_": "edgeopt.core.config_objects.to_config"}, "step.x", "must name a dataclass"),
    "class that is not a dataclass": (
        {"_target_": "edgeopt.cache.StageCache", "root": "/"},
        "step.x",
        "must name a dataclass",
    ),
    "module imported by edgeopt": (
        {"_target_": "edgeopt.cache.eviction.shutil.rmtree"},
        "step.x",
        "cannot be imported",
    ),
    "missing value": ({"_target_": "edgeopt.core.target.Target"}, "target", "target.name"),
    "missing value (???)": ({**TARGET, "name": "???"}, "target", "target.name"),
    "null for a required value": ({**TARGET, "name": None}, "target", "target.name"),
    "string for an integer": (
        {**TARGET, "threads": "four"},
        "target",
        "target.threads: `threads` must be an integer, got 'four'",
    ),
    "float for an integer": ({**TARGET, "threads": 1.5}, "target", "target.threads.*1.5"),
    "boolean for an integer": ({**TARGET, "threads": True}, "target", "target.threads.*True"),
    "integer for a string": ({**TARGET, "name": 3}, "target", "target.name: `name` must be a string, got 3"),
    "string for a list": ({**LORA, "targets": "q_proj"}, "step.lora", "step.lora.targets.*'q_proj'"),
    "list item of wrong type": ({**LORA, "targets": ["q_proj", 3]}, "step.lora", r"targets\[1\].*3"),
    "value outside of the choices": (
        {"_target_": "edgeopt.datasets.bundled.BundledText", "split": "train"},
        "text",
        "text.split: `split` must be one of calibration, validation; got 'train'",
    ),
    "string for a config object": ({**TARGET, "device": "box"}, "target", "target.device.*'box'"),
    "invalid nested field": (
        {
            **TARGET,
            "device": {"_target_": "edgeopt.core.target.Device", "name": "d", "cpu": "c", "cores": "2", "ram_bytes": 1},
        },
        "target",
        "target.device.cores.*'2'",
    ),
    "value rejected by the class": ({**TARGET, "threads": -1}, "target", "target.threads.*-1"),
    "string for a mapping": ("int4", "step.quantize", "step.quantize.*'int4'"),
    "null for a mapping": (None, "step.quantize", "step.quantize.*None"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_config_raises_one_line_error(case: str) -> None:
    data, location, message = INVALID[case]
    with pytest.raises(ConfigError, match=message) as caught:
        instantiate(data, location)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_integer_is_accepted_for_float() -> None:
    lora = instantiate({**LORA, "alpha": 16})
    assert (lora.alpha, type(lora.alpha)) == (16.0, float)
