from __future__ import annotations

from typing import Any

from edgeopt.measure.harness.tables import build_tables


def run(**samples: Any) -> dict[str, Any]:
    return {"group": "g", "disturbance": "", "report": {"samples": samples}}


def test_samples_table_has_one_row_per_figure() -> None:
    first = run(latency={"load_s": 0.5, "ttft_s": {"16": [0.1, 0.2]}, "decode_s": [[0.01], [0.02, 0.03]]})
    second = {**run(latency={"load_s": 0.6}), "disturbance": "other processes used 20% of the cores"}
    table = build_tables([first, second])["samples"]
    assert table["columns"] == ["probe", "process", "disturbance", "figure", "number", "value"]
    assert table["data"] == [
        ["latency", 0, "", "load_s", 0, 0.5],
        ["latency", 0, "", "ttft_s.16", 0, 0.1],
        ["latency", 0, "", "ttft_s.16", 1, 0.2],
        ["latency", 0, "", "decode_s.0", 0, 0.01],
        ["latency", 0, "", "decode_s.1", 0, 0.02],
        ["latency", 0, "", "decode_s.1", 1, 0.03],
        ["latency", 1, "other processes used 20% of the cores", "load_s", 0, 0.6],
    ]


def test_token_ids_and_texts_are_not_figures() -> None:
    tables = build_tables(
        [run(continuations={"continuations": [[1, 2], [3]], "texts": [{"prompt": "a", "continuation": "b"}]})]
    )
    assert "samples" not in tables
    assert tables["generations"] == {"columns": ["prompt", "continuation"], "data": [["a", "b"]]}


def test_worst_documents_have_their_own_table() -> None:
    worst = [{"window": 3, "nll_per_token": 5.0, "baseline_nll_per_token": None, "text": "x"}]
    tables = build_tables([run(quality={"worst": worst, "nll": [5.0]})])
    assert tables["worst_documents"]["columns"] == ["window", "nll_per_token", "baseline_nll_per_token", "text"]
    assert tables["worst_documents"]["data"] == [[3, 5.0, None, "x"]]


def test_empty_tables_are_omitted() -> None:
    assert build_tables([]) == {}
