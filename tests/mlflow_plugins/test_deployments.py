"""Test the deployment target `edgeopt` through MLflow's client."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException
from support import samples

from edgeopt.machine import process_identity


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("EDGEOPT_DEPLOYMENTS", str(tmp_path / "deployments"))
    edgeopt_client = get_deploy_client("edgeopt")
    yield edgeopt_client
    for deployment in edgeopt_client.list_deployments():
        edgeopt_client.delete_deployment(deployment["name"])


def test_deployment_serves_engine_until_deleted(client: Any, tmp_path: Path) -> None:
    folder = str(samples.engine(tmp_path / "engine").directory)
    deployment = client.create_deployment("toy", folder)
    assert client.list_deployments() == [deployment]
    assert client.get_deployment("toy")["model_uri"] == folder
    assert requests.get(f"{deployment['endpoint']}/models", timeout=5).json()["data"][0]["id"] == "toy"
    first, second = client.predict("toy", ["def f (", "x"])["predictions"]
    assert first
    assert second
    with pytest.raises(MlflowException, match=r"rejected the request: .*must have 1 to"):
        client.predict("toy", [""])
    with pytest.raises(MlflowException, match="'toy' already exists"):
        client.create_deployment("toy", folder)
    client.delete_deployment("toy")
    assert not process_identity.is_alive(deployment["process"])
    assert client.list_deployments() == []
    client.delete_deployment("toy")
    with pytest.raises(MlflowException, match=r"'toy' does not exist\. Running deployments: none"):
        client.get_deployment("toy")


def test_dead_deployment_is_not_listed(client: Any, tmp_path: Path) -> None:
    deployment = client.create_deployment("toy", str(samples.engine(tmp_path / "engine").directory))
    pid = int(deployment["process"].partition(":")[0])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert client.list_deployments() == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("../evil", {}, "a deployment name must consist of"),
        ("toy", {"flavor": "onnx"}, "got 'onnx'"),
        ("toy", {"config": {"colour": "red"}}, "must be one of host, port, .* got 'colour'"),
    ],
)
def test_invalid_arguments_are_rejected(client: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message):
        client.create_deployment(name, "/nowhere", **arguments)


def test_failed_start_reports_last_log_line(client: Any, tmp_path: Path) -> None:
    with pytest.raises(
        MlflowException, match=r"the service ended during its start: edgeopt: .*the folder has no manifest"
    ):
        client.create_deployment("toy", str(tmp_path))
    assert client.list_deployments() == []
