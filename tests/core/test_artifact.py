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


def seal(folder: Path, files: dict[str, bytes] = FILES, **more: Any) -> Checkpoint:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Checkpoint.seal(folder, **({"format": "test-1", "spec": SPEC, "made_by": {"step": "x"}} | more))


def test_what_was_sealed_is_read_and_verified(tmp_path: Path) -> None:
    sealed = seal(tmp_path)
    read = Checkpoint.read(tmp_path)
    read.verify()
    assert read == sealed
    assert read.size_bytes == sum(map(len, FILES.values())), "the manifest is not deployed and not counted"
    assert {f.path for f in read.files} == FILES.keys()


def test_the_digest_does_not_depend_on_folder_or_maker(tmp_path: Path) -> None:
    first = seal(tmp_path / "a", made_by={"host": "one"})
    second = seal(tmp_path / "b" / "c", dict(reversed(FILES.items())), made_by={"host": "two"})
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
    ids=["format", "spec", "content", "one more file", "name"],
)
def test_the_digest_depends_on_everything_that_is_deployed(tmp_path: Path, change: dict[str, Any]) -> None:
    assert seal(tmp_path / "a").digest != seal(tmp_path / "b", **change).digest


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    seal(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(InputError, match="no manifest"):
        Checkpoint.read(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    seal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"'tokenizer.json' is missing"):
        Checkpoint.read(tmp_path)


def test_a_truncated_file_is_found_on_reading(tmp_path: Path) -> None:
    seal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weigh")
    with pytest.raises(InputError, match=r"model.safetensors.*5 bytes instead of 7"):
        Checkpoint.read(tmp_path)


def test_a_file_of_equal_length_is_found_by_verify(tmp_path: Path) -> None:
    seal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    read = Checkpoint.read(tmp_path)
    with pytest.raises(InputError, match=r"model.safetensors.*sha256"):
        read.verify()


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/hostname"])
def test_a_manifest_may_not_name_files_outside_its_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "engine"
    seal(folder)
    (tmp_path / "secret").write_bytes(b"{}")
    edit(folder, lambda d: d["files"][0].update(path=path, size_bytes=2))
    with pytest.raises(InputError, match="leaves the folder"):
        Checkpoint.read(folder)


CHANGES = {
    "another format": lambda d: d.update(format="test-2"),
    "another spec": lambda d: d["spec"].update(hidden_size=65),
    "another hash": lambda d: d["files"][0].update(sha256="0" * 64),
    "a file forgotten": lambda d: d["files"].pop(),
    "no digest": lambda d: d.pop("digest"),
    "no format": lambda d: d.pop("format"),
    "no files": lambda d: d.update(files=None),
    "files of another type": lambda d: d.update(files=["a"]),
    "a number for a path": lambda d: d["files"][0].update(path=3),
    "layers of another type": lambda d: d["spec"].update(layers=3),
    "an unknown field": lambda d: d["files"][0].update(mode="777"),
    "not a number": lambda d: d["spec"].update(hidden_size=float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_refused(tmp_path: Path, change: str) -> None:
    seal(tmp_path)
    edit(tmp_path, CHANGES[change])
    with pytest.raises(InputError):
        Checkpoint.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'"text"'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    seal(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match="manifest"):
        Checkpoint.read(tmp_path)


@settings(max_examples=60)
@given(
    contents=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4),
    which=st.integers(0),
    position=st.integers(0),
    bit=st.integers(0, 7),
)
def test_flipping_any_bit_of_any_file_is_found(contents: list[bytes], which: int, position: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seal(folder, {f"file{n}": content for n, content in enumerate(contents)})
        flip(folder / f"file{which % len(contents)}", position, bit)
        with pytest.raises(InputError, match=f"file{which % len(contents)}"):
            Checkpoint.read(folder).verify()


@settings(max_examples=150)
@given(position=st.integers(0, 2000), bit=st.integers(0, 7))
def test_flipping_any_bit_of_the_manifest_is_found_or_changes_nothing_deployed(position: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = seal(folder)
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
