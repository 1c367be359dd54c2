"""Check `edgeopt predict` for every runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgeopt.cli.main import main

SIZE = "size/engine_mib"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> Any:
        assert main(["predict", *arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def test_parts_add_up_to_what_is_predicted(told: Any) -> None:
    found = told("recipe=int4")
    parts = found["breakdown"]
    assert (found["parameters"], found["tier"]) == (4_196_608, "tiny")
    assert parts["disk_bytes"] == sum(parts[name] for name in ("weights", "tables", "adapters", "graphs", "carried"))
    assert found["figures"][SIZE]["value"] == pytest.approx(parts["disk_bytes"] / 2**20)
    assert found["figures"]["memory/peak_rss_mib"]["value"] == pytest.approx(parts["peak_bytes"] / 2**20)


@pytest.mark.parametrize(
    ("knob", "absent"), [("gate_up_fused", "disk_bytes"), ("packed_on_disk", "peak_bytes")], ids=["size", "memory"]
)
def test_a_sum_that_is_not_predicted_has_no_parts(knob: str, absent: str, told: Any) -> None:
    found = told("recipe=int4", f"runtime.{knob}=true")
    assert {"disk_bytes", "peak_bytes"} - found["breakdown"].keys() == {absent}
    assert len(found["figures"]) == 1


def test_without_known_parts_the_figures_are_printed_with_bands(told: Any) -> None:
    found = told("recipe=int4", "runtime=onnx")
    assert found["breakdown"] == {}
    assert found["figures"].keys() == {SIZE}
    assert found["figures"][SIZE]["low"] < found["figures"][SIZE]["value"] < found["figures"][SIZE]["high"]


def test_rounding_and_packing_change_the_size_of_portable_engines(told: Any) -> None:
    sizes = [
        told(f"recipe={recipe}", "runtime=onnx", f"runtime.packed_on_disk={packed}")["figures"][SIZE]["value"]
        for recipe, packed in (("int4", "false"), ("int8", "false"), ("int8", "true"))
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.5 * sizes[-2]


@pytest.mark.parametrize("runtime", ["genai", "onnx"])
def test_a_size_beyond_its_limit_does_not_fit(runtime: str, told: Any) -> None:
    found = told(f"runtime={runtime}", "recipe=int8", "limits.size.engine_mib=2 MiB", code=3)
    (limit,) = (each for each in found["limits"] if each["metric"] == SIZE)
    assert not limit["fits"]


def test_people_read_the_band_of_each_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "recipe=int4", "runtime=onnx"]) == 0
    assert re.search(rf"{SIZE} [\d.]+ MiB, between [\d.]+ MiB and [\d.]+ MiB", capsys.readouterr().out)
