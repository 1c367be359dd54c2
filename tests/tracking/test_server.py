"""Test that a local store is created completely or not at all."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient

from edgeopt.tracking import server


def test_kill_during_creation_leaves_no_partial_store(tmp_path: Path):
    database = tmp_path / "mlflow.db"
    uri = f"sqlite:///{database}"
    child = subprocess.Popen([sys.executable, "-c", f"from edgeopt.tracking import server; server.probe({uri!r})"])
    wait_for_tables(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not database.exists()

    server.probe(uri)
    assert MlflowClient(tracking_uri=uri).create_experiment("after the kill")


def test_existing_store_is_not_changed(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    server.probe(uri)
    experiment = MlflowClient(tracking_uri=uri).create_experiment("mine")
    server.probe(uri)
    assert MlflowClient(tracking_uri=uri).get_experiment(experiment).name == "mine"
    assert {p.name.removesuffix("-wal").removesuffix("-shm") for p in tmp_path.iterdir()} == {"mlflow.db"}


def test_new_store_uses_write_ahead_log(tmp_path: Path):
    for database in (tmp_path / "mine.db", tmp_path / "mlflows.db"):
        if database.stem == "mlflows":
            MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments(max_results=1)
        server.probe(f"sqlite:///{database}")
    assert journal(tmp_path / "mine.db") == "wal"
    assert journal(tmp_path / "mlflows.db") == "delete"


def test_two_processes_write_into_new_store(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    server.probe(uri)
    write = "import sys; from mlflow import MlflowClient; c = MlflowClient(tracking_uri=sys.argv[1]); "
    write += "[c.create_experiment(f'theirs {n}') for n in range(30)]"
    child = subprocess.Popen([sys.executable, "-c", write, uri])
    client = MlflowClient(tracking_uri=uri)
    written = 0
    while child.poll() is None or written < 30:
        client.create_experiment(f"mine {written}")
        written += 1
    assert child.returncode == 0
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM experiments").fetchone() == (1 + 30 + written,)


def journal(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("PRAGMA journal_mode").fetchone()[0])


def wait_for_tables(folder: Path, timeout_s: float = 60) -> None:
    """Wait until a database below `folder` contains data."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if any(p.stat().st_size > 0 for p in folder.rglob("mlflow.db")):
            return
        time.sleep(0.005)
    raise AssertionError("no table was created")
