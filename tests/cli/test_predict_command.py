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
def predict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> Any:
        assert main(["predict", *arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def test_breakdown_adds_up_to_prediction(predict: Any) -> None:
    found = predict("recipe=int4")
    breakdown = found["breakdown"]
    assert (found["parameters"], found["tier"]) == (4_196_608, "tiny")
    components = ("weights", "embeddings", "adapters", "graphs", "copied_files")
    assert breakdown["disk_bytes"] == sum(breakdown[name] for name in components)
    assert found["predictions"][SIZE]["value"] == pytest.approx(breakdown["disk_bytes"] / 2**20)
    assert found["predictions"]["memory/peak_rss_mib"]["value"] == pytest.approx(breakdown["peak_bytes"] / 2**20)


@pytest.mark.parametrize(
    ("option", "absent"), [("gate_up_fused", "disk_bytes"), ("packed_on_disk", "peak_bytes")], ids=["size", "memory"]
)
def test_unpredicted_total_is_not_in_breakdown(option: str, absent: str, predict: Any) -> None:
    found = predict("recipe=int4", f"runtime.{option}=true")
    assert {"disk_bytes", "peak_bytes"} - found["breakdown"].keys() == {absent}
    assert len(found["predictions"]) == 1


def test_runtime_without_breakdown_predicts_an_interval(predict: Any) -> None:
    found = predict("recipe=int4", "runtime=onnx")
    assert found["breakdown"] == {}
    assert found["predictions"].keys() == {SIZE}
    assert found["predictions"][SIZE]["low"] < found["predictions"][SIZE]["value"] < found["predictions"][SIZE]["high"]


def test_bits_and_packing_change_onnx_engine_size(predict: Any) -> None:
    sizes = [
        predict(f"recipe={recipe}", "runtime=onnx", f"runtime.packed_on_disk={packed}")["predictions"][SIZE]["value"]
        for recipe, packed in (("int4", "false"), ("int8", "false"), ("int8", "true"))
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.5 * sizes[-2]


@pytest.mark.parametrize("runtime", ["genai", "onnx"])
def test_size_beyond_limit_does_not_fit(runtime: str, predict: Any) -> None:
    found = predict(f"runtime={runtime}", "recipe=int8", "limits.size.engine_mib=2 MiB", code=3)
    (limit,) = (check for check in found["limits"] if check["metric"] == SIZE)
    assert not limit["fits"]


def test_predict_prints_the_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "recipe=int4", "runtime=onnx"]) == 0
    assert re.search(rf"{SIZE} [\d.]+ MiB, between [\d.]+ MiB and [\d.]+ MiB", capsys.readouterr().out)
