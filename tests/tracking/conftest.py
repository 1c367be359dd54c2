from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.tracking.recorder import MlflowRecorder


@pytest.fixture(scope="session", params=["sqlite", "server"])
def recorder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MlflowRecorder:
    """A recorder on a store of its own: a SQLite file, or a server."""
    file = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    made = MlflowRecorder(tracking_uri=file if request.param == "sqlite" else request.getfixturevalue("mlflow_server"))
    made.connect()
    return made


@pytest.fixture
def study(recorder: MlflowRecorder, request: pytest.FixtureRequest) -> str:
    """The name of an open study that no other test uses."""
    name = request.node.name.replace("[", "-").replace("]", "")
    recorder.open_study(name, {"search": {"seed": 0}}, {})
    return name


@pytest.fixture
def engine_folder(tmp_path: Path) -> Path:
    return tmp_path / "engine"
