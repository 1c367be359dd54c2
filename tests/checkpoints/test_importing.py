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
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_a_hugging_face_folder_becomes_a_verified_checkpoint(model: Path, into: Path) -> None:
    checkpoint = importing.import_checkpoint(model, into)
    Checkpoint.read(into).verify()
    assert checkpoint.spec == ModelSpec.from_hf_config(json.loads((model / "config.json").read_text()))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.path for f in checkpoint.files}


def test_the_same_model_has_the_same_digest_wherever_it_lies(model: Path, into: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "README.md").write_text("files beside the model do not count")
    (tmp_path / "more").mkdir()
    assert (
        importing.import_checkpoint(model, into).digest == importing.import_checkpoint(other, tmp_path / "more").digest
    )


def test_what_edgeopt_made_is_taken_in_as_it_is(model: Path, into: Path, tmp_path: Path) -> None:
    made = importing.import_checkpoint(model, into)
    (tmp_path / "again").mkdir()
    assert importing.import_checkpoint(into, tmp_path / "again").digest == made.digest
    again = Checkpoint.read(tmp_path / "again")
    again.verify()
    assert again.spec == importing.spec_of(into) == made.spec


def test_a_checkpoint_that_was_changed_is_refused(model: Path, into: Path, tmp_path: Path) -> None:
    importing.import_checkpoint(model, into)
    config = into / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace("64", "65", 1))
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match="was modified"):
        importing.import_checkpoint(into, tmp_path / "again")


def test_an_engine_is_no_model(model: Path, into: Path, tmp_path: Path) -> None:
    made = importing.import_checkpoint(model, into)
    Engine.seal(into, format="genai-1", spec=made.spec, made_by={})
    for take in (importing.spec_of, lambda folder: importing.import_checkpoint(folder, tmp_path)):
        with pytest.raises(InputError, match="this is a genai-1 engine"):
            take(into)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def rewrite(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["WhisperForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))


WEIGHTS = "model.safetensors"
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (pickled, "pytorch_model.bin is a pickle"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"no \*.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "a broken tokenizer": (rewrite("tokenizer.json", "{}"), "tokenizer cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "a config that is no JSON": (rewrite("config.json", "{"), "no JSON"),
    "a config that is not text": (rewrite("config.json", b"\xff\xfe\x00"), "no JSON"),
    "a config that is a list": (rewrite("config.json", "[]"), "config.json"),
    "an unknown architecture": (architecture, "WhisperForConditionalGeneration"),
    "one byte too few": (lambda f: cut(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), "corrupt or truncated"),
    "a header cut off": (lambda f: cut(f / WEIGHTS, 100), "header is cut off"),
    "five bytes": (lambda f: cut(f / WEIGHTS, 5), "header is cut off"),
    "an empty file": (lambda f: cut(f / WEIGHTS, 0), "header is cut off"),
    "zeros": (rewrite(WEIGHTS, bytes(1000)), "corrupt"),
    "a header that is a list": (rewrite(WEIGHTS, header([])), "no safetensors header"),
    "a header without offsets": (rewrite(WEIGHTS, header({"w": {"shape": [1]}})), "no safetensors header"),
    "offsets of another type": (
        rewrite(WEIGHTS, header({"w": ENTRY, "v": ENTRY | {"data_offsets": [0, "x"]}}) + bytes(4)),
        "no safetensors header",
    ),
    "bytes too many": (rewrite(WEIGHTS, header({"w": ENTRY}) + bytes(5)), "corrupt or truncated"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_model_that_cannot_be_used_is_refused_with_its_cause(model: Path, into: Path, case: str) -> None:
    expected_error, told = DAMAGE[case]
    expected_error(model)
    with pytest.raises(InputError, match=told) as caught:
        importing.import_checkpoint(model, into)
    assert str(model) in caught.value.location
    assert caught.value.exit_code == 2
    assert not list(into.iterdir()), "nothing is taken over from a model that is refused"


def test_no_pickle_is_opened(model: Path, into: Path, tmp_path: Path) -> None:
    """A pickle that would leave a trace if anything read it."""
    trace = tmp_path / "trace"
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(trace) + b"'\ntR.")
    with pytest.raises(InputError, match="can run code"):
        importing.import_checkpoint(model, into)
    assert not trace.exists()


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_weights_or_an_input_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            importing.check_safetensors(path)


def test_a_fingerprint_changes_when_a_file_is_written(model: Path) -> None:
    before = importing.fingerprint(model)
    assert importing.fingerprint(model) == before
    (model / "tokenizer_config.json").write_text("{ }")
    assert importing.fingerprint(model) != before


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_real_models_are_taken_in(realdata: Path, into: Path, name: str) -> None:
    checkpoint = importing.import_checkpoint(realdata / name, into)
    checkpoint.verify()
    assert checkpoint.spec.parameters > 200_000
