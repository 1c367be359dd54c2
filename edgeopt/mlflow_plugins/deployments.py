"""Deploy engines as HTTP services on this machine: the MLflow deployment target `edgeopt`.

    mlflow deployments create -t edgeopt --name champion -m models:/edgeopt@champion -C port=8000

starts `edgeopt serve` in the background. `mlflow deployments delete` stops it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST

from edgeopt.machine import process_identity

FOLDER_VARIABLE = "EDGEOPT_DEPLOYMENTS"
"""Environment variable that names the folder of deployment records and logs."""
OPTIONS = ("host", "port", "queue-size", "timeout")
"""Options that `--config` accepts; see `edgeopt serve --help`."""
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 40


def target_help() -> str:
    """Return the text of `mlflow deployments help -t edgeopt`."""
    return f"{__doc__}\nOptions (-C NAME=VALUE), as for `edgeopt serve`: {', '.join(OPTIONS)}."


def run_local(
    target: str, name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Create a deployment. All deployments of this target are local."""
    EdgeoptDeployments(target).create_deployment(name, model_uri, flavor, config)


class EdgeoptDeployments(BaseDeploymentClient):  # type: ignore[misc]
    """Client of the deployments on this machine. Each deployment is one process with one record file."""

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Serve the engine of a registered version or a folder, and wait until the service responds.

        Raises MlflowException if the arguments are invalid, the deployment exists, or the service fails to start.
        """
        options = _parse_options(name, flavor, config)
        if self._find(name) is not None:
            raise MlflowException(f"deployment {name!r} already exists", RESOURCE_ALREADY_EXISTS)
        options.setdefault("port", str(_free_port()))
        command = [sys.executable, "-m", "edgeopt.cli", "serve", model_uri, "--name", name]
        command += [text for option, value in options.items() for text in (f"--{option}", value)]
        folder = _records_folder()
        log = folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        url = f"http://{options.get('host', '127.0.0.1')}:{options['port']}"
        _wait_until_ready(process, url, log)
        document = {
            "name": name,
            "flavor": "edgeopt",
            "model_uri": model_uri,
            "endpoint": f"{url}/v1",
            "log": str(log),
            "process": process_identity.identity(process.pid),
            "host": process_identity.host_id(),
        }
        draft = folder / f".{name}.json"
        draft.write_text(json.dumps(document))
        draft.rename(folder / f"{name}.json")
        return document

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Stop the service and start it with another engine or other options.

        The service does not respond during the restart. Raises MlflowException if the deployment does not exist.
        """
        current = self.get_deployment(name)
        self.delete_deployment(name)
        return self.create_deployment(name, model_uri or current["model_uri"], flavor, config)

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """Stop the service after its running requests. If it does not exist, do nothing."""
        deployment = self._find(name)
        if deployment is None:
            return
        pid, deadline = int(deployment["process"].partition(":")[0]), time.monotonic() + STOP_TIMEOUT_S
        os.kill(pid, signal.SIGTERM)
        while process_identity.is_alive(deployment["process"]):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # reap the service if it is a child of this process
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        (_records_folder() / f"{name}.json").unlink(missing_ok=True)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return the records of all running deployments, sorted by name."""
        names = sorted(path.stem for path in _records_folder().glob("[!.]*.json"))
        return [deployment for name in names if (deployment := self._find(name)) is not None]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return the record of a running deployment. Raises MlflowException if it does not exist."""
        deployment = self._find(name)
        if deployment is None:
            running = ", ".join(d["name"] for d in self.list_deployments()) or "none"
            raise MlflowException(
                f"deployment {name!r} does not exist. Running deployments: {running}", RESOURCE_DOES_NOT_EXIST
            )
        return deployment

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """Return one completion per prompt. `inputs` has the format of the MLflow model's `predict`.

        Raises MlflowException if the deployment does not exist or the service rejects a prompt.
        """
        from edgeopt.tracking.flavor import parse_prompts

        url = self.get_deployment(str(deployment_name))["endpoint"]
        texts = []
        for prompt in parse_prompts(inputs):
            response = requests.post(f"{url}/completions", json={"prompt": prompt}, timeout=600)
            if not response.ok:
                raise MlflowException(
                    f"deployment {deployment_name!r} rejected the request: {response.text}", INVALID_PARAMETER_VALUE
                )
            texts.append(response.json()["choices"][0]["text"])
        return PredictionsResponse({"predictions": texts})

    def _find(self, name: str) -> dict[str, Any] | None:
        """Return the record of a running deployment, or None.

        Delete the record if its process has ended, or if it belongs to another host or to an earlier boot of this one.
        """
        path = _records_folder() / f"{_require_valid_name(name)}.json"
        try:
            document: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        if document["host"] == process_identity.host_id() and process_identity.is_alive(document["process"]):
            return document
        path.unlink(missing_ok=True)
        return None


def _records_folder() -> Path:
    """Return the folder of deployment records and logs; create it if it does not exist."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(os.environ.get(FOLDER_VARIABLE) or Path(state) / "edgeopt" / "deployments")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require_valid_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise MlflowException(
            f"a deployment name must consist of letters, digits, '.', '-' and '_', got {name!r}",
            INVALID_PARAMETER_VALUE,
        )
    return name


def _parse_options(name: str, flavor: str | None, config: Mapping[str, Any] | None) -> dict[str, str]:
    _require_valid_name(name)
    if flavor not in (None, "edgeopt"):
        raise MlflowException(f"`flavor` must be 'edgeopt' for this target, got {flavor!r}", INVALID_PARAMETER_VALUE)
    unknown = sorted(set(config or {}) - set(OPTIONS))
    if unknown:
        raise MlflowException(
            f"an option must be one of {', '.join(OPTIONS)}, got {unknown[0]!r}", INVALID_PARAMETER_VALUE
        )
    return {option: str(value) for option, value in (config or {}).items()}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the service responds. Raises MlflowException if the service ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise MlflowException(f"the service ended during its start: {lines[-1] if lines else 'its log is empty'}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=2).ok:
                return
        time.sleep(0.2)
    process.kill()
    process.wait()
    raise MlflowException(f"the service did not respond within {START_TIMEOUT_S} s. See its log {log}")
