"""The local store is there as a whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

from edgeopt.tracking import server


def test_a_kill_while_the_tables_are_made_leaves_no_half_of_a_store(tmp_path: Path):
    database = tmp_path / "mlflow.db"
    uri = f"sqlite:///{database}"
    child = subprocess.Popen([sys.executable, "-c", f"from edgeopt.tracking import server; server.probe({uri!r})"])
    wait_for_tables(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not database.exists()

    server.probe(uri)
    assert MlflowClient(tracking_uri=uri).create_experiment("after the kill")


def test_a_store_that_exists_is_left_as_it_is(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    server.probe(uri)
    made = MlflowClient(tracking_uri=uri).create_experiment("mine")
    server.probe(uri)
    assert MlflowClient(tracking_uri=uri).get_experiment(made).name == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]


def wait_for_tables(folder: Path, patience_s: float = 60) -> None:
    """Until somewhere below `folder` a database has begun to fill."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if any(p.stat().st_size > 0 for p in folder.rglob("mlflow.db")):
            return
        time.sleep(0.005)
    raise AssertionError("no table was made")
