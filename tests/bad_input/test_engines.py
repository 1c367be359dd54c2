"""Check the errors of invalid engine folders, unknown registered models and servers that do not answer."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from support import samples

from edgeopt.core.artifact import Checkpoint

from .conftest import Damage, ErrorOf, remove, rewrite


@pytest.mark.parametrize("command", ["audit", "releases"])
def test_unregistered_model_is_rejected(command: str, error_of: ErrorOf, registry: str) -> None:
    line = error_of(command, "unknown", "--tracking-uri", registry)
    assert line == "NAME: no model 'unknown' is registered. Promote a study: `edgeopt promote`"


@pytest.fixture
def tracked(registry: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(registry)


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("models:/nope@champion", "nope"),
        ("models:/known@chmpion", "chmpion"),
        ("models:/known/7", "7"),
        ("models:/", "models:/"),
    ],
)
@pytest.mark.parametrize("command", [("bench", "--engine"), ("generate",), ("run", "model=registry")])
def test_unknown_registered_model_is_rejected(
    command: tuple[str, ...], uri: str, expected: str, error_of: ErrorOf
) -> None:
    arguments = (*command, f"model.uri='{uri}'") if command[0] == "run" else (*command, uri)
    assert expected in error_of(*arguments)


@pytest.fixture
def engine(work: Path) -> Path:
    return samples.engine(work / "engine").directory


def change_file(folder: Path) -> None:
    content = bytearray((folder / "table.npy").read_bytes())
    content[-1] ^= 1
    (folder / "table.npy").write_bytes(content)


def lengthen_file(folder: Path) -> None:
    with (folder / "table.npy").open("ab") as file:
        file.write(b"x")


def change_manifest(folder: Path) -> None:
    manifest = folder / "edgeopt.json"
    manifest.write_text(manifest.read_text().replace('"context_length": 64', '"context_length": 65'))


def replace_by_checkpoint(folder: Path) -> None:
    spec = Checkpoint.read(folder).spec
    Checkpoint.seal(folder, format="checkpoint-1", spec=spec, made_by={"source": "x"})


ENGINE: dict[str, tuple[Damage, str]] = {
    "changed file": (change_file, "table.npy: the file was modified"),
    "longer file": (lengthen_file, "table.npy: the file was modified"),
    "missing file": (remove("table.npy"), "'table.npy' is missing"),
    "changed manifest": (change_manifest, "the manifest was modified"),
    "broken manifest": (rewrite("edgeopt.json", b"{}"), "the manifest cannot be read"),
    "no manifest": (remove("edgeopt.json"), "the folder has no manifest"),
    "checkpoint": (replace_by_checkpoint, "the folder must contain an engine, got a checkpoint"),
    "missing folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("command", [("bench", "--engine"), ("generate",)])
@pytest.mark.parametrize("case", ENGINE)
def test_invalid_engine_folder_is_rejected(
    case: str, command: tuple[str, ...], error_of: ErrorOf, engine: Path
) -> None:
    damage, expected = ENGINE[case]
    damage(engine)
    line = error_of(*command, "engine")
    assert expected in line
    assert line.startswith("engine")


@pytest.mark.parametrize("option", [("--max-new-tokens", "0"), ("--prompt", "x " * 99), ("--adapter", "x")])
def test_generate_rejects_invalid_options(option: tuple[str, str], error_of: ErrorOf, engine: Path) -> None:
    assert error_of("generate", str(engine), *option).startswith(f"{option[0]}: ")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("run", "file/state/cache: the cache folder cannot be written"),
        ("sweep", "file/state/studies.db: the folder of studies cannot be created"),
    ],
)
def test_unwritable_state_folder_is_rejected(
    command: str, expected: str, error_of: ErrorOf, work: Path, tiny_model: Path
) -> None:
    (work / "file").write_text("content")
    line = error_of(command, "state=file/state", "model=local", f"model.path={tiny_model}", code=1)
    assert expected in line
    assert "to a writable folder" in line
    assert (work / "file").read_text() == "content"


@pytest.mark.parametrize(
    "command",
    [
        ("run", "recipe=int4", "model=local", "model.path={tiny}"),
        ("generate", "models:/known@champion"),
        ("run", "model=registry", "model.uri='models:/known@champion'"),
    ],
)
def test_unreachable_server_is_reported_within_seconds(
    command: tuple[str, ...], error_of: ErrorOf, tiny_model: Path, tracked: None
) -> None:
    import mlflow

    mlflow.set_tracking_uri("http://127.0.0.1:9")
    started = time.monotonic()
    line = error_of(*(part.replace("{tiny}", str(tiny_model)) for part in command), code=1)
    assert "127.0.0.1:9: " in line
    assert "not answer" in line or "not respond" in line
    assert "MLFLOW_TRACKING_URI" in line
    assert time.monotonic() - started < 15
