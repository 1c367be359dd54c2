"""Contract suite of registry readers: each returns what MLflow's own client returns."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.study_snapshot import Champion
from edgeopt.errors import TrackingError
from edgeopt.release.registry import fast_reader
from edgeopt.release.registry.types import RegisteredModel

SOURCE = "edgeopt-test:/nothing"


@pytest.fixture(params=["sqlite", "postgresql", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/mlflow.db"
    if request.param == "server":
        return str(request.getfixturevalue("mlflow_server"))
    database: str = request.getfixturevalue("postgresql").database()
    return database.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def model(client: MlflowClient) -> str:
    """Return the name of a model with a deleted version and a moved alias. A second model has a similar name."""
    name = f"it's a model {uuid.uuid4().hex}".replace("'", "’")
    for other in (name, f"{name} 2"):
        client.create_registered_model(other, tags={"key": "of the model"})
        for number in range(4):
            client.create_model_version(other, SOURCE, tags={"number": str(number), "empty": "", "ü": "“é”\n" * 9})
    run_id = client.create_run(client.create_experiment(name)).info.run_id
    client.create_model_version(name, SOURCE, run_id=run_id)
    client.delete_model_version(name, "2")
    client.set_model_version_tag(name, "1", "number", "changed")
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "smallest", "4")
    client.set_registered_model_alias(name, "champion", "3")
    client.set_registered_model_alias(f"{name} 2", "champion", "2")
    return name


def read_fast(uri: str, *names: str) -> list[RegisteredModel]:
    return (fast_reader.read_by_rest if uri.startswith("http") else fast_reader.read_from_database)(uri, names)


def test_fast_reader_equals_mlflow_client(uri: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [model, f"{model} 2"]
    models = read_fast(uri, *names)
    assert models == fast_reader.read_by_client(uri, names)
    assert models[0].aliases == {"champion": "3", "smallest": "4"}
    assert [version.number for version in models[0].versions] == ["1", "3", "4", "5"]
    assert models[0].versions[0].tags == {"number": "changed", "empty": "", "ü": "“é”\n" * 9}
    assert [bool(version.run_id) for version in models[0].versions] == [False, False, False, True]
    monkeypatch.setattr(fast_reader, "_PAGE_SIZE", 1)
    assert read_fast(uri, *names) == models


@pytest.mark.usefixtures("model")
def test_missing_model_is_empty(uri: str) -> None:
    nothing = [RegisteredModel(aliases={}, versions=())]
    assert read_fast(uri, "absent") == fast_reader.read_by_client(uri, ["absent"]) == nothing
    assert fast_reader.read_models(["absent"], uri) == nothing


def test_champion_of_another_study_is_none(uri: str, client: MlflowClient, model: str) -> None:
    client.set_model_version_tag(model, "3", tags.STUDY, "mine")
    assert (
        fast_reader.champion(model, uri)
        == fast_reader.champion(model, uri, study="mine")
        == Champion(name=model, version="3")
    )
    assert fast_reader.champion(model, uri, study="another") is None
    assert fast_reader.champion("absent", uri) is None


# fallback to MLflow's client


@pytest.fixture
def client_reads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Return the list to which the test adds every URI that MLflow's client reads."""
    uris = []
    read_by_client = fast_reader.read_by_client

    def record_and_read(uri: str | None, names: list[str]) -> list[RegisteredModel]:
        uris.append(uri)
        return read_by_client(uri, names)

    monkeypatch.setattr(fast_reader, "read_by_client", record_and_read)
    return uris


def create_database(folder: Path) -> str:
    """Create a database with one model and return its URI."""
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(tracking_uri=uri).create_registered_model("known")
    MlflowClient(tracking_uri=uri).create_model_version("known", SOURCE)
    return uri


def test_local_database_is_read_without_client(tmp_path: Path, client_reads: list[str | None]) -> None:
    uri = create_database(tmp_path)
    assert len(fast_reader.read_models(["known"], uri)[0].versions) == 1
    assert client_reads == []


def test_client_reads_separate_registry_uri(
    tmp_path: Path, client_reads: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = create_database(tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    assert len(fast_reader.read_models(["known"], f"sqlite:///{tmp_path}/other.db")[0].versions) == 1
    assert client_reads == [f"sqlite:///{tmp_path}/other.db"]


def test_missing_database_is_left_to_client(tmp_path: Path, client_reads: list[str | None]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert fast_reader.read_models(["known"], uri) == [RegisteredModel(aliases={}, versions=())]
    assert client_reads == [uri]


def test_client_raises_error_for_unexpected_tables(tmp_path: Path, client_reads: list[str | None]) -> None:
    uri = create_database(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE registered_model_aliases")
    with pytest.raises(TrackingError, match="the registry failed"):
        fast_reader.read_models(["known"], uri)
    assert len(client_reads) == 1


@pytest.mark.parametrize(
    ("uri", "environment"),
    [
        (None, "sqlite:///{folder}/mlflow.db"),
        (None, ""),
        ("sqlite:///{folder}/mlflow.db", "sqlite:///{folder}/absent.db"),
    ],
)
def test_default_store_matches_mlflow(
    uri: str | None, environment: str, tmp_path: Path, client_reads: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_database(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment.format(folder=tmp_path))
    [found] = fast_reader.read_models(["known"], uri.format(folder=tmp_path) if uri else None)
    assert len(found.versions) == 1
    assert client_reads == []


# servers other than MLflow


class FakeServer(BaseHTTPRequestHandler):
    """Answer every request with the same status and body, and store the credentials of the last request."""

    status, body, authorization = 200, b"", ""

    def do_GET(self) -> None:
        type(self).authorization = self.headers.get("Authorization", "")
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def fake_server() -> Iterator[tuple[str, type[FakeServer]]]:
    handler = type("Handler", (FakeServer,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, b"who are you?"), (404, b"<html>"), (404, b'{"error_code": "OTHER"}'), (200, b"<html>log in</html>")],
)
def test_unexpected_server_response_raises_tracking_error(
    fake_server: tuple[str, type[FakeServer]], status: int, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, handler = fake_server
    handler.status, handler.body = status, body
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="the registry failed"):
        fast_reader.read_models(["known"], uri)


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        ({}, ""),
        ({"USERNAME": "me", "PASSWORD": "secret"}, "Basic bWU6c2VjcmV0"),
        ({"TOKEN": "t"}, "Bearer t"),
        ({"USERNAME": "me", "PASSWORD": "secret", "TOKEN": "t"}, "Basic bWU6c2VjcmV0"),
    ],
)
def test_authentication_matches_mlflow_client(
    fake_server: tuple[str, type[FakeServer]],
    credentials: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, handler = fake_server
    handler.body = json.dumps({"registered_model": {}}).encode()
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for name, value in credentials.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    assert fast_reader.read_by_rest(uri, ["known"]) == [RegisteredModel(aliases={}, versions=())]
    assert handler.authorization == expected
    fast_reader.read_by_client(uri, ["known"])
    assert handler.authorization == expected
