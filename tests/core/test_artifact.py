from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import specs

from edgeopt.core.artifact import MANIFEST, Artifact, Checkpoint
from edgeopt.errors import InputError

SPEC = specs.llama(layers=1)
FILES = {"model.safetensors": b"weights", "tokenizer.json": b"{}", "artifacts/importance.json": b"[1, 2]", "empty": b""}


def seal_files(folder: Path, files: dict[str, bytes] = FILES, **more: Any) -> Checkpoint:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Checkpoint.seal(folder, **({"format": "test-1", "spec": SPEC, "made_by": {"step": "x"}} | more))


def test_sealed_artifact_is_read_and_verified(tmp_path: Path) -> None:
    sealed = seal_files(tmp_path)
    read = Checkpoint.read(tmp_path)
    read.verify()
    assert read == sealed
    assert read.size_bytes == sum(map(len, FILES.values())), "the manifest is not deployed and does not count"
    assert {f.path for f in read.files} == FILES.keys()


def test_digest_ignores_folder_and_origin(tmp_path: Path) -> None:
    first = seal_files(tmp_path / "a", made_by={"host": "one"})
    second = seal_files(tmp_path / "b" / "c", dict(reversed(FILES.items())), made_by={"host": "two"})
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert first.digest == second.digest == Checkpoint.read(tmp_path / "moved").digest


@pytest.mark.parametrize(
    "change",
    [
        {"format": "test-2"},
        {"spec": SPEC.with_layers(SPEC.layers * 2)},
        {"files": FILES | {"tokenizer.json": b"[]"}},
        {"files": FILES | {"more": b""}},
        {"files": {("renamed" if k == "empty" else k): v for k, v in FILES.items()}},
    ],
    ids=["format", "spec", "content", "additional file", "name"],
)
def test_digest_covers_everything_deployed(tmp_path: Path, change: dict[str, Any]) -> None:
    assert seal_files(tmp_path / "a").digest != seal_files(tmp_path / "b", **change).digest


def test_folder_without_manifest_is_rejected(tmp_path: Path) -> None:
    seal_files(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(InputError, match="has no manifest"):
        Checkpoint.read(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    seal_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"'tokenizer.json' is missing"):
        Checkpoint.read(tmp_path)


def test_read_detects_truncated_file(tmp_path: Path) -> None:
    seal_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weigh")
    with pytest.raises(InputError, match=r"model.safetensors.*5 bytes, the manifest has 7"):
        Checkpoint.read(tmp_path)


def test_verify_detects_change_of_equal_length(tmp_path: Path) -> None:
    seal_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    read = Checkpoint.read(tmp_path)
    with pytest.raises(InputError, match=r"model.safetensors.*SHA-256"):
        read.verify()


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/hostname"])
def test_manifest_with_outside_path_is_rejected(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "engine"
    seal_files(folder)
    (tmp_path / "secret").write_bytes(b"{}")
    edit(folder, lambda d: d["files"][0].update(path=path, size_bytes=2))
    with pytest.raises(InputError, match="`path` must stay inside the folder"):
        Checkpoint.read(folder)


CHANGES = {
    "other format": lambda d: d.update(format="test-2"),
    "other spec": lambda d: d["spec"].update(hidden_size=65),
    "other hash": lambda d: d["files"][0].update(sha256="0" * 64),
    "file removed": lambda d: d["files"].pop(),
    "missing digest": lambda d: d.pop("digest"),
    "missing format": lambda d: d.pop("format"),
    "files is null": lambda d: d.update(files=None),
    "file record is a string": lambda d: d.update(files=["a"]),
    "path is a number": lambda d: d["files"][0].update(path=3),
    "layers is a number": lambda d: d["spec"].update(layers=3),
    "unknown field": lambda d: d["files"][0].update(mode="777"),
    "hidden size is NaN": lambda d: d["spec"].update(hidden_size=float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modified_manifest_is_rejected(tmp_path: Path, change: str) -> None:
    seal_files(tmp_path)
    edit(tmp_path, CHANGES[change])
    with pytest.raises(InputError):
        Checkpoint.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'"text"'])
def test_invalid_manifest_is_rejected(tmp_path: Path, content: bytes) -> None:
    seal_files(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match="manifest"):
        Checkpoint.read(tmp_path)


@settings(max_examples=60)
@given(
    contents=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4),
    file_index=st.integers(0),
    position=st.integers(0),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_is_detected(contents: list[bytes], file_index: int, position: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seal_files(folder, {f"file{n}": content for n, content in enumerate(contents)})
        flip(folder / f"file{file_index % len(contents)}", position, bit)
        with pytest.raises(InputError, match=f"file{file_index % len(contents)}"):
            Checkpoint.read(folder).verify()


@settings(max_examples=150)
@given(position=st.integers(0, 2000), bit=st.integers(0, 7))
def test_flipped_manifest_bit_never_changes_content(position: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = seal_files(folder)
        flip(folder / MANIFEST, position, bit)
        try:
            after: Artifact = Checkpoint.read(folder)
        except InputError:
            return
        assert (after.format, after.spec, after.files) == (before.format, before.spec, before.files)


def edit(folder: Path, change: Any) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
