"""Open, verify, rebuild and promote the study that commit 49994e4 created (tests/data)."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import mlflow
import pytest

from edgeopt.config.assemble import open_engine

ARCHIVE = Path(__file__).parent / "data" / "study-49994e4.tar.xz"
ORIGINAL_FOLDER = "/tmp/edgeopt-49994e4"
DIGEST = "03f85f215baa163c9c28f8827f30f11bc6466a77e2b254300663f45e10a6e687"
PROMOTED_RUN = "77e976aa8da64f3da8be0655f577c347"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the folder of that study. Its databases contain absolute paths, which are replaced."""
    copy = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(copy, filter="data")
    for name in ("mlflow.db", ".edgeopt/studies.db"):
        _relocate(copy / name, ORIGINAL_FOLDER, str(copy))
    return copy


def _relocate(database: Path, old: str, new: str) -> None:
    """Replace a path in every text column of a SQLite database."""
    with sqlite3.connect(database) as connection:
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in list(connection.execute(f"pragma table_info({table})")):
                if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                    connection.execute(
                        f"update {table} set {column} = replace({column}, ?, ?) where {column} like ?",
                        (old, new, f"%{old}%"),
                    )
    connection.close()


def edgeopt(folder: Path, *arguments: str) -> tuple[int, Any, str]:
    """Run a command in the folder; return its exit code, JSON document and stderr."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EDGEOPT_"))}
    command = [sys.executable, "-m", "edgeopt.cli", *arguments, "--config-dir", str(folder), "--json"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr


def test_study_opens(folder: Path) -> None:
    code, document, err = edgeopt(folder, "front", "kill")
    assert code == 0, err
    assert [trial["state"] for trial in document["trials"]] == ["finished"] * 5
    assert document["front"] == [1]
    assert document["champion"] == {"name": "tiny", "version": "1", "trial": 1}
    code, status, err = edgeopt(folder, "status", "kill")
    assert code == 0, err
    assert (status["feasible"], status["front"]) == (5, 1)


def test_engine_opens_and_generates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (manifest,) = folder.glob("mlruns/edgeopt/models/*/artifacts/engine/edgeopt.json")
    engine, runtime = open_engine(manifest.parent)
    assert engine.digest == DIGEST
    session = runtime.open(engine, threads=1)
    assert len(list(session.generate([5, 6, 7], 4, stop_at_end=False))) == 4
    session.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    assert mlflow.pyfunc.load_model("models:/tiny@champion").predict(["def read("])


def test_registered_model_verifies(folder: Path) -> None:
    for command in (("verify", "tiny@champion"), ("audit", "tiny")):
        code, document, err = edgeopt(folder, *command)
        assert code == 0, err
        assert not document.get("faults")


def test_run_rebuilds_to_the_same_digest(folder: Path) -> None:
    code, document, err = edgeopt(folder, "rebuild", PROMOTED_RUN)
    assert code == 0, err
    assert document["engine"]["digest"] == document["wanted"] == DIGEST


def test_study_promotes_again(folder: Path) -> None:
    code, document, err = edgeopt(folder, "promote", "kill", "--policy", "tiny")
    assert code == 0, err
    assert [(r["number"], r["version"], r["created"]) for r in document["releases"]] == [(1, "1", False)]
    text = (folder / "registry" / "tiny.yaml").read_text()
    (folder / "registry" / "second.yaml").write_text(text.replace("model: tiny", "model: second"))
    code, document, err = edgeopt(folder, "promote", "kill", "--policy", "second")
    assert code == 0, err
    assert document["aliases"] == {"champion": "1"}


def test_study_continues(folder: Path) -> None:
    code, document, err = edgeopt(folder, "sweep", "--config-name", "tiny_sweep", "search.trials=6")
    assert code == 0, err
    states = [trial["state"] for trial in document["trials"]]
    assert states[:5] == ["finished"] * 5
    assert len(states) >= 5
