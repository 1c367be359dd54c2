from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.tracking.recorder import MlflowRecorder


@pytest.fixture(scope="session", params=["sqlite", "server"])
def recorder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MlflowRecorder:
    """Return a recorder with its own store: a SQLite file or a server."""
    file = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    recorder = MlflowRecorder(
        tracking_uri=file if request.param == "sqlite" else request.getfixturevalue("mlflow_server")
    )
    recorder.connect()
    return recorder


@pytest.fixture
def study(recorder: MlflowRecorder, request: pytest.FixtureRequest) -> str:
    """Open a study that no other test uses, and return its name."""
    name = request.node.name.replace("[", "-").replace("]", "")
    recorder.open_study(name, {"search": {"seed": 0}}, {})
    return name


@pytest.fixture
def engine_folder(tmp_path: Path) -> Path:
    return tmp_path / "engine"
