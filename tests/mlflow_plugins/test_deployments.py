"""`mlflow deployments -t edgeopt`, by MLflow's own client."""

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
    found = get_deploy_client("edgeopt")
    yield found
    for deployment in found.list_deployments():
        found.delete_deployment(deployment["name"])


def test_an_engine_is_deployed_asked_and_ended(client: Any, tmp_path: Path) -> None:
    folder = str(samples.engine(tmp_path / "engine").directory)
    made = client.create_deployment("toy", folder)
    assert client.list_deployments() == [made]
    assert client.get_deployment("toy")["model_uri"] == folder
    assert requests.get(f"{made['endpoint']}/models", timeout=5).json()["data"][0]["id"] == "toy"
    first, second = client.predict("toy", ["def f (", "x"])["predictions"]
    assert first
    assert second
    with pytest.raises(MlflowException, match=r"refused: .*cannot be continued"):
        client.predict("toy", [""])
    with pytest.raises(MlflowException, match="'toy' is there already"):
        client.create_deployment("toy", folder)
    client.delete_deployment("toy")
    assert not process_identity.is_alive(made["process"])
    assert client.list_deployments() == []
    client.delete_deployment("toy")
    with pytest.raises(MlflowException, match="no deployment 'toy' is running here, but none"):
        client.get_deployment("toy")


def test_a_deployment_that_died_is_forgotten(client: Any, tmp_path: Path) -> None:
    made = client.create_deployment("toy", str(samples.engine(tmp_path / "engine").directory))
    number = int(made["process"].partition(":")[0])
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    assert client.list_deployments() == []


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("../evil", {}, "cannot name a deployment"),
        ("toy", {"flavor": "onnx"}, "and not 'onnx'"),
        ("toy", {"config": {"colour": "red"}}, "unknown option 'colour', known are host, port"),
    ],
)
def test_what_makes_no_sense_starts_nothing(client: Any, name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message):
        client.create_deployment(name, "/nowhere", **more)


def test_a_service_that_cannot_start_says_why(client: Any, tmp_path: Path) -> None:
    with pytest.raises(MlflowException, match=r"the service ended: edgeopt: .*no manifest is here"):
        client.create_deployment("toy", str(tmp_path))
    assert client.list_deployments() == []
