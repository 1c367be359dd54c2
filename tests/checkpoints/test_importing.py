from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.checkpoints import importing
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.model_spec import ModelSpec
from edgeopt.errors import InputError


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_hugging_face_folder_becomes_checkpoint(model: Path, into: Path) -> None:
    checkpoint = importing.import_checkpoint(model, into)
    Checkpoint.read(into).verify()
    assert checkpoint.spec == ModelSpec.from_hf_config(json.loads((model / "config.json").read_text()))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.path for f in checkpoint.files}


def test_digest_ignores_folder_and_other_files(model: Path, into: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "README.md").write_text("other files do not count")
    (tmp_path / "more").mkdir()
    assert (
        importing.import_checkpoint(model, into).digest == importing.import_checkpoint(other, tmp_path / "more").digest
    )


def test_checkpoint_is_imported_unchanged(model: Path, into: Path, tmp_path: Path) -> None:
    original = importing.import_checkpoint(model, into)
    (tmp_path / "again").mkdir()
    assert importing.import_checkpoint(into, tmp_path / "again").digest == original.digest
    again = Checkpoint.read(tmp_path / "again")
    again.verify()
    assert again.spec == importing.spec_of(into) == original.spec


def test_modified_checkpoint_is_rejected(model: Path, into: Path, tmp_path: Path) -> None:
    importing.import_checkpoint(model, into)
    config = into / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace("64", "65", 1))
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match="was modified"):
        importing.import_checkpoint(into, tmp_path / "again")


def test_engine_is_rejected_as_model(model: Path, into: Path, tmp_path: Path) -> None:
    original = importing.import_checkpoint(model, into)
    Engine.seal(into, format="genai-1", spec=original.spec, made_by={})
    for read in (importing.spec_of, lambda folder: importing.import_checkpoint(folder, tmp_path)):
        with pytest.raises(InputError, match="must contain a model, got an engine of format genai-1"):
            read(into)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def rewrite(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["WhisperForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))


WEIGHTS = "model.safetensors"
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (make_pickle, "got the pickle pytorch_model.bin, which can run code"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"no \*.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "invalid tokenizer": (rewrite("tokenizer.json", "{}"), "tokenizer cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (rewrite("config.json", "{"), "not valid JSON"),
    "config is not text": (rewrite("config.json", b"\xff\xfe\x00"), "not valid JSON"),
    "config is a list": (rewrite("config.json", "[]"), "config.json"),
    "unsupported architecture": (set_architecture, "WhisperForConditionalGeneration"),
    "one byte missing": (lambda f: truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), "corrupt or truncated"),
    "truncated header": (lambda f: truncate(f / WEIGHTS, 100), "header is truncated"),
    "five bytes": (lambda f: truncate(f / WEIGHTS, 5), "header is truncated"),
    "empty file": (lambda f: truncate(f / WEIGHTS, 0), "header is truncated"),
    "zeros": (rewrite(WEIGHTS, bytes(1000)), "corrupt"),
    "header is a list": (rewrite(WEIGHTS, header([])), "not a safetensors header"),
    "header without offsets": (rewrite(WEIGHTS, header({"w": {"shape": [1]}})), "not a safetensors header"),
    "offsets of wrong type": (
        rewrite(WEIGHTS, header({"w": ENTRY, "v": ENTRY | {"data_offsets": [0, "x"]}}) + bytes(4)),
        "not a safetensors header",
    ),
    "extra bytes": (rewrite(WEIGHTS, header({"w": ENTRY}) + bytes(5)), "corrupt or truncated"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_unusable_model_is_rejected_with_reason(model: Path, into: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(model)
    with pytest.raises(InputError, match=message) as caught:
        importing.import_checkpoint(model, into)
    assert str(model) in caught.value.location
    assert caught.value.exit_code == 2
    assert not list(into.iterdir()), "a rejected model leaves no files"


def test_pickle_is_never_loaded(model: Path, into: Path, tmp_path: Path) -> None:
    """Loading this pickle would create a file."""
    trace = tmp_path / "trace"
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(trace) + b"'\ntR.")
    with pytest.raises(InputError, match="can run code"):
        importing.import_checkpoint(model, into)
    assert not trace.exists()


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_raise_input_error_only(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            importing.check_safetensors(path)


def test_fingerprint_changes_when_file_is_written(model: Path) -> None:
    before = importing.fingerprint(model)
    assert importing.fingerprint(model) == before
    (model / "tokenizer_config.json").write_text("{ }")
    assert importing.fingerprint(model) != before


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_published_model_is_imported(realdata: Path, into: Path, name: str) -> None:
    checkpoint = importing.import_checkpoint(realdata / name, into)
    checkpoint.verify()
    assert checkpoint.spec.parameters > 200_000
