"""Test `mlflow models serve` on a registered engine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import requests
from support import samples

from edgeopt.tracking import flavor


@pytest.mark.timeout(240)
def test_mlflow_server_serves_registered_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run():
        flavor.log_model(samples.engine(tmp_path / "engine").directory, registered_model_name="toy")
    expected = mlflow.pyfunc.load_model("models:/toy/1").predict(["def f ("])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/toy/1", "--env-manager", "local"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": uri,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        response = None
        for _ in range(500):
            with contextlib.suppress(requests.ConnectionError):
                response = requests.post(
                    f"http://127.0.0.1:{port}/invocations", json={"inputs": ["def f ("]}, timeout=60
                )
                break
            time.sleep(0.2)
        assert response is not None, (tmp_path / "log").read_text()
        assert response.json() == {"predictions": expected}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
