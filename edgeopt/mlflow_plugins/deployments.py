"""The deployment target `edgeopt`: engines as HTTP services on this machine.

    mlflow deployments create -t edgeopt --name champion -m models:/edgeopt@champion -C port=8000

starts `edgeopt serve` in the background, which goes on until `mlflow deployments delete`.
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

FOLDER = "EDGEOPT_DEPLOYMENTS"
"""Environment variable: the folder that knows of deployments and holds their logs."""
OPTIONS = ("host", "port", "waiting", "patience")
"""What `--config` may hold; see `edgeopt serve --help`."""
START_S = 120
STOP_S = 40


def target_help() -> str:
    """Text of `mlflow deployments help -t edgeopt`."""
    return f"{__doc__}\nOptions (-C NAME=VALUE), as of `edgeopt serve`: {', '.join(OPTIONS)}."


def run_local(
    target: str, name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """A deployment of this target is local already."""
    EdgeoptDeployments(target).create_deployment(name, model_uri, flavor, config)


class EdgeoptDeployments(BaseDeploymentClient):  # type: ignore[misc]
    """Deployments of this user on this machine; each is a process, and a file that names it."""

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Serve the engine of a registered version, or of a folder, and wait until it answers."""
        options = _checked(name, flavor, config)
        if self._known(name) is not None:
            raise MlflowException(f"deployment {name!r} is there already", RESOURCE_ALREADY_EXISTS)
        options.setdefault("port", str(_free_port()))
        command = [sys.executable, "-m", "edgeopt.cli", "serve", model_uri, "--name", name]
        command += [text for option, value in options.items() for text in (f"--{option}", value)]
        folder = _folder()
        log = folder / f"{name}.log"
        with log.open("wb") as file:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        url = f"http://{options.get('host', '127.0.0.1')}:{options['port']}"
        _wait(started, url, log)
        document = {
            "name": name,
            "flavor": "edgeopt",
            "model_uri": model_uri,
            "endpoint": f"{url}/v1",
            "log": str(log),
            "process": process_identity.identity(started.pid),
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
        """Serve another engine, or with other options, under the same name; it does not answer meanwhile."""
        known = self.get_deployment(name)
        self.delete_deployment(name)
        return self.create_deployment(name, model_uri or known["model_uri"], flavor, config)

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """End a service, after the requests that it is answering. One that is not there is no error."""
        known = self._known(name)
        if known is None:
            return
        number, end = int(known["process"].partition(":")[0]), time.monotonic() + STOP_S
        os.kill(number, signal.SIGTERM)
        while process_identity.is_alive(known["process"]):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)  # where this process started it
            if time.monotonic() > end:
                os.kill(number, signal.SIGKILL)
            time.sleep(0.1)
        (_folder() / f"{name}.json").unlink(missing_ok=True)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """All that are running."""
        names = sorted(path.stem for path in _folder().glob("[!.]*.json"))
        return [known for name in names if (known := self._known(name)) is not None]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        known = self._known(name)
        if known is None:
            running = ", ".join(d["name"] for d in self.list_deployments()) or "none"
            raise MlflowException(f"no deployment {name!r} is running here, but {running}", RESOURCE_DOES_NOT_EXIST)
        return known

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """One completion for each prompt; `inputs` as `predict` of the MLflow model takes them."""
        from edgeopt.tracking.flavor import prompts

        url = self.get_deployment(str(deployment_name))["endpoint"]
        texts = []
        for prompt in prompts(inputs):
            answer = requests.post(f"{url}/completions", json={"prompt": prompt}, timeout=600)
            if not answer.ok:
                raise MlflowException(f"{deployment_name} refused: {answer.text}", INVALID_PARAMETER_VALUE)
            texts.append(answer.json()["choices"][0]["text"])
        return PredictionsResponse({"predictions": texts})

    def _known(self, name: str) -> dict[str, Any] | None:
        """What is kept of a deployment whose process lives; what is kept of a dead one is forgotten."""
        path = _folder() / f"{_name(name)}.json"
        try:
            document: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        if document["host"] == process_identity.host_id() and process_identity.is_alive(document["process"]):
            return document
        path.unlink(missing_ok=True)
        return None


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(os.environ.get(FOLDER) or Path(state) / "edgeopt" / "deployments")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise MlflowException(
            f"{name!r} cannot name a deployment: use letters, digits, - and _", INVALID_PARAMETER_VALUE
        )
    return name


def _checked(name: str, flavor: str | None, config: Mapping[str, Any] | None) -> dict[str, str]:
    _name(name)
    if flavor not in (None, "edgeopt"):
        raise MlflowException(f"this target serves the flavor edgeopt, and not {flavor!r}", INVALID_PARAMETER_VALUE)
    unknown = sorted(set(config or {}) - set(OPTIONS))
    if unknown:
        told = f"unknown option {unknown[0]!r}, known are {', '.join(OPTIONS)}"
        raise MlflowException(told, INVALID_PARAMETER_VALUE)
    return {option: str(value) for option, value in (config or {}).items()}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait(started: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the service answers; MlflowException with what it said where it ends before."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if started.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines()
            raise MlflowException(f"the service ended: {said[-1] if said else 'it said nothing'}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=2).ok:
                return
        time.sleep(0.2)
    started.kill()
    started.wait()
    raise MlflowException(f"the service did not answer within {START_S} s, see {log}")
