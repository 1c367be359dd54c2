"""Start MLflow servers that tests can kill and restart."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import requests

from edgeopt.cli.commands.ui import LEAN


class MlflowServer:
    """MLflow server process. Its store and artifacts are in `folder` unless `store` or `artifacts` are set.

    Attributes:
        uri: address of the server; the same after a restart.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        store: str = "",
        artifacts: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._folder = folder
        self._command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
        self._command += ["--backend-store-uri", store or f"sqlite:///{folder}/mlflow.db"]
        self._command += ["--artifacts-destination", artifacts or str(folder / "artifacts"), *arguments]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self._environment = {**environ, **LEAN, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the server and return when it answers; raise AssertionError with its log after 90 s."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                if requests.get(f"{self.uri}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                time.sleep(0.2)
        raise AssertionError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """Kill the server and its workers with SIGKILL."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
