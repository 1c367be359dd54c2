"""Check the errors of invalid texts and models."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from .conftest import Damage, ErrorOf, remove, rewrite

LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 40
WEIGHTS = "model.safetensors"
TEXT: dict[str, tuple[str, bytes | None, list[str]]] = {
    "empty": ("t.txt", b"", ["t.txt: the text is empty"]),
    "blank": ("t.txt", b" \n\n", ["t.txt: the text is empty"]),
    "missing": ("t.txt", None, ["t.txt: the file does not exist"]),
    "undecodable": ("t.txt", b"\xff\xfe\x00", ["t.txt: the text cannot be read", "UTF-8"]),
    "of another format": ("t.csv", b"a,b", ["t.csv: the file must end in .txt or .jsonl, got .csv"]),
    "a line that is not an object": ("t.jsonl", b'{"text": "a"}\n7\n', ["t.jsonl:2: ", '"text"']),
    "a line without text": ("t.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', ["t.jsonl:3: ", '"text"']),
    "a truncated line": ("t.jsonl", b'{"text": "a', ["t.jsonl:1: ", '"text"']),
    "short": ("t.txt", b"hi\n", ["t.txt: the longest document must have at least 16 token ids, got "]),
}


@pytest.mark.parametrize("role", ["evaluation", "calibration"])
@pytest.mark.parametrize("case", TEXT)
def test_bad_text_is_rejected(case: str, role: str, error_of: ErrorOf, work: Path, tiny_model: Path) -> None:
    name, content, expected = TEXT[case]
    if content is not None:
        (work / name).write_bytes(content)
    line = error_of("run", "model=local", f"model.path={tiny_model}", f"text@{role}=file", f"{role}.path={name}")
    assert [part for part in expected if part not in line] == [], line
    assert not list(work.glob(".edgeopt/cache/engine")), "nothing was built"


def test_overlapping_texts_are_rejected(error_of: ErrorOf, work: Path) -> None:
    assert "also in the calibration text" in error_of("run", "text@calibration=reference_validation")
    for name, shared in (("a.jsonl", LONG), ("b.jsonl", f"  {LONG}\n")):
        (work / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in (name, shared)))
    texts = [f"{role}.path={name}" for role, name in (("calibration", "a.jsonl"), ("evaluation", "b.jsonl"))]
    line = error_of("run", "text@calibration=file", "text@evaluation=file", *texts)
    assert line.startswith("b.jsonl: document 1 ")
    assert "a.jsonl" in line


def truncate_weights(end: int) -> Damage:
    """Return a function that keeps the bytes before `end` of the weights in a folder."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:end])


CORRUPT_HEADER = (16).to_bytes(8, "little") + b"no json at all, but bytes"
BERT = b'{"architectures": ["BertForMaskedLM"], "vocab_size": 300}'
MODEL: dict[str, tuple[Damage, list[str]]] = {
    "truncated": (
        truncate_weights(-1000),
        ["model.safetensors: ", "corrupt or truncated", "according to the header"],
    ),
    "truncated header": (truncate_weights(20), ["model.safetensors: ", "the header is truncated"]),
    "corrupt header": (rewrite(WEIGHTS, CORRUPT_HEADER), ["model.safetensors: ", "not a safetensors header"]),
    "pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        ["got the pickle pytorch_model.bin", "safe_serialization"],
    ),
    "no weights": (remove(WEIGHTS), ["the folder has no *.safetensors"]),
    "no tokenizer": (remove("tokenizer.json"), ["no tokenizer.json"]),
    "invalid tokenizer": (rewrite("tokenizer.json", b"{}"), ["tokenizer.json: the tokenizer cannot be read"]),
    "wrong architecture": (rewrite("config.json", BERT), ["config.json: ", "'BertForMaskedLM'", "ForCausalLM"]),
    "no config": (remove("config.json"), ["the folder has no config.json"]),
    "config that is not JSON": (rewrite("config.json", b"{"), ["config.json: the file is not valid JSON"]),
    "missing folder": (shutil.rmtree, ["the folder does not exist"]),
}


@pytest.mark.parametrize("case", MODEL)
def test_bad_model_is_rejected(case: str, error_of: ErrorOf, work: Path, tiny_model: Path) -> None:
    damage, expected = MODEL[case]
    damage(shutil.copytree(tiny_model, work / "given"))
    line = error_of("run", "model=local", "model.path=given")
    assert [part for part in [*expected, "given"] if part not in line] == [], line
    assert not [p for p in work.glob(".edgeopt/cache/*/*") if p.parent.name in ("model", "engine", "scratch")]


def test_rank_above_smallest_matrix_side_is_rejected(error_of: ErrorOf, tiny_model: Path) -> None:
    line = error_of("run", "recipe=prune_lora", "model=local", f"model.path={tiny_model}", "step.lora.rank=64")
    assert line == "step.lora.rank: `rank` must be at most the smallest matrix side 32, got 64. Use at most 32"


def test_model_without_suitable_runtime_is_rejected(error_of: ErrorOf, realdata: Path, work: Path) -> None:
    if not (realdata / "stories260K").is_dir():
        pytest.skip("stories260K is not available")
    overrides = ("recipe=baseline", "+step@step.kv=kv_cache", "order=[kv]")
    line = error_of("run", *overrides, "model=local", f"model.path={realdata / 'stories260K'}")
    assert line.startswith("runtime: ")
    assert [
        part for part in ("multiple of 16", "got 8", "portable ONNX does not support keys") if part not in line
    ] == []
    assert not list(work.glob(".edgeopt/cache/engine"))
    assert not (work / "mlflow.db").exists()


def test_unreachable_hub_is_reported_within_seconds(error_of: ErrorOf) -> None:
    started = time.monotonic()
    line = error_of("run", "model=smollm2_135m")
    assert line.startswith("model.repo: cannot download HuggingFaceTB/SmolLM2-135M at revision ")
    assert "model=local model.path=FOLDER" in line
    assert time.monotonic() - started < 15
