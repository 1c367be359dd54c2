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


def described(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a _target_ whose values are all given in the file itself."""
    if not isinstance(node, dict):
        return
    if "_target_" in node and "???" not in node.values():
        yield f"{name}:{node['_target_']}", {k: v for k, v in node.items() if k != "defaults"}
        return
    for value in node.values():
        yield from described(value, name)


def narrowed(data: Any, to: Any) -> Any:
    """`data` without the keys that `to` leaves to their defaults."""
    return {k: narrowed(data[k], v) for k, v in to.items()} if isinstance(to, dict) else data


def resolved(text: str) -> str:
    """A file of conf/ with the rounding, the importance and the kernels that another file fills in."""
    text = text.replace("${oc.select:target.kernels,null}", "null")
    text = text.replace("${importance}", "{_target_: edgeopt.compress.pruning.taylor.Taylor}")
    return text.replace("${rounding}", "{_target_: edgeopt.compress.quantization.rtn.Rtn}")


def complete(text: str) -> bool:
    """Whether a file of conf/ holds all that its part requires; test_config composes the others with their files."""
    return "probes." not in text and "/step@retrain" not in text


IN_CONF = [
    found
    for path in sorted(CONF.rglob("*.yaml"))
    if complete(path.read_text())
    for found in described(yaml.safe_load(resolved(path.read_text())), path.relative_to(CONF).as_posix())
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
TARGET = {"_target_": "edgeopt.core.target.Target", "name": "box"}
LORA = {"_target_": "edgeopt.compress.recovery.lora.Lora"}


def test_the_configs_name_parts() -> None:
    assert len(IN_CONF) > 20


@pytest.mark.parametrize("data", [d for _, d in IN_CONF], ids=[n for n, _ in IN_CONF])
def test_a_part_described_and_constructed_again_is_the_same(data: dict[str, Any]) -> None:
    part = instantiate(data)
    again = to_config(part)
    assert json.loads(json.dumps(again)) == again, "a description is plain JSON"
    assert again["_target_"] == data["_target_"]
    assert narrowed(again, data) == data, "what the file says is what the part holds"
    assert instantiate(again) == part
    assert to_config(instantiate(again)) == again
    assert digest(to_config(instantiate(again))) == digest(again)


def test_parts_inside_parts_survive_the_round_trip() -> None:
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
def test_equal_data_has_one_canonical_text(data: Any) -> None:
    text = canonical_json(data)
    assert json.loads(text) == data
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_change_the_digest(data: dict[str, int]) -> None:
    assert digest(dict(reversed(data.items()))) == digest(data)


def test_the_digest_is_equal_in_every_process() -> None:
    data = {"b": [1, 2.5, None, "é"], "a": True}
    code = f"from edgeopt.core.config_objects import digest; print(digest({data!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(data)


WRONG = {
    "no target": ({"name": "box"}, "", "_target_"),
    "target of another type": ({"_target_": 3}, "", "_target_"),
    "unknown key": ({**TARGET, "treads": 2}, "target", "'treads'.*threads"),
    "foreign target": ({"_target_": "os.system", "command": "true"}, "step.x", "outside edgeopt"),
    "foreign target with our name in front": ({"_target_": "edgeopt_evil.X"}, "step.x", "outside edgeopt"),
    "absent module": ({"_target_": "edgeopt.nowhere.X"}, "step.x", "cannot be loaded"),
    "absent class": ({"_target_": "edgeopt.core.target.X"}, "step.x", "cannot be loaded"),
    "a function": ({"_target_": "edgeopt.core.config_objects.to_config"}, "step.x", "not a part"),
    "a class that is no dataclass": ({"_target_": "edgeopt.cache.StageCache", "root": "/"}, "step.x", "not a part"),
    "a module that ours imports": ({"_target_": "edgeopt.cache.eviction.shutil.rmtree"}, "step.x", "cannot be loaded"),
    "missing value": ({"_target_": "edgeopt.core.target.Target"}, "target", "target.name"),
    "value left open": ({**TARGET, "name": "???"}, "target", "target.name"),
    "value that is null": ({**TARGET, "name": None}, "target", "target.name"),
    "text for a number": ({**TARGET, "threads": "four"}, "target", "target.threads.*'four'.*int"),
    "a fraction for a whole number": ({**TARGET, "threads": 1.5}, "target", "target.threads.*1.5"),
    "a truth value for a number": ({**TARGET, "threads": True}, "target", "target.threads.*True"),
    "a number for text": ({**TARGET, "name": 3}, "target", "target.name.*3.*str"),
    "a value for a list": ({**LORA, "targets": "q_proj"}, "step.lora", "step.lora.targets.*'q_proj'"),
    "a wrong item of a list": ({**LORA, "targets": ["q_proj", 3]}, "step.lora", r"targets\[1\].*3"),
    "no member of a choice": (
        {"_target_": "edgeopt.datasets.bundled.BundledText", "split": "train"},
        "text",
        "text.split.*'train'.*validation",
    ),
    "text for a part": ({**TARGET, "device": "box"}, "target", "target.device.*'box'"),
    "a fault inside a part": (
        {
            **TARGET,
            "device": {"_target_": "edgeopt.core.target.Device", "name": "d", "cpu": "c", "cores": "2", "ram_bytes": 1},
        },
        "target",
        "target.device.cores.*'2'",
    ),
    "a value that the part refuses": ({**TARGET, "threads": -1}, "target", "target.threads.*-1"),
    "text instead of a mapping": ("int4", "step.quantize", "step.quantize.*'int4'"),
    "nothing instead of a mapping": (None, "step.quantize", "step.quantize.*None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_is_one_clear_config_error(case: str) -> None:
    data, location, told = WRONG[case]
    with pytest.raises(ConfigError, match=told) as caught:
        instantiate(data, location)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_whole_number_is_taken_for_a_fraction() -> None:
    lora = instantiate({**LORA, "alpha": 16})
    assert (lora.alpha, type(lora.alpha)) == (16.0, float)
