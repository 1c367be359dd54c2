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
from edgeopt.release.registry.types import Registered

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
    """Four versions of which one was deleted, and two aliases of which one was moved; others lie beside it."""
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


def quick(uri: str, *names: str) -> list[Registered]:
    return (fast_reader.by_rest if uri.startswith("http") else fast_reader.by_database)(uri, names)


def test_models_are_what_mlflows_client_says(uri: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [model, f"{model} 2"]
    found = quick(uri, *names)
    assert found == fast_reader.by_client(uri, names)
    assert found[0].aliases == {"champion": "3", "smallest": "4"}
    assert [version.number for version in found[0].versions] == ["1", "3", "4", "5"]
    assert found[0].versions[0].tags == {"number": "changed", "empty": "", "ü": "“é”\n" * 9}
    assert [bool(version.run_id) for version in found[0].versions] == [False, False, False, True]
    monkeypatch.setattr(fast_reader, "_PAGE", 1)
    assert quick(uri, *names) == found


@pytest.mark.usefixtures("model")
def test_a_model_that_is_not_there_has_nothing(uri: str) -> None:
    nothing = [Registered(aliases={}, versions=())]
    assert quick(uri, "absent") == fast_reader.by_client(uri, ["absent"]) == nothing
    assert fast_reader.read(["absent"], uri) == nothing


def test_a_champion_of_another_study_counts_as_none(uri: str, client: MlflowClient, model: str) -> None:
    client.set_model_version_tag(model, "3", tags.STUDY, "mine")
    assert (
        fast_reader.champion(model, uri)
        == fast_reader.champion(model, uri, study="mine")
        == Champion(name=model, version="3")
    )
    assert fast_reader.champion(model, uri, study="another") is None
    assert fast_reader.champion("absent", uri) is None


# what is left to the client


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The URIs for which the client was asked."""
    found = []
    by_client = fast_reader.by_client

    def counted(uri: str | None, names: list[str]) -> list[Registered]:
        found.append(uri)
        return by_client(uri, names)

    monkeypatch.setattr(fast_reader, "by_client", counted)
    return found


def filled(folder: Path) -> str:
    """The URI of a database with one model."""
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(tracking_uri=uri).create_registered_model("known")
    MlflowClient(tracking_uri=uri).create_model_version("known", SOURCE)
    return uri


def test_the_client_is_asked_of_no_database_that_is_as_expected(tmp_path: Path, asked: list[str | None]) -> None:
    uri = filled(tmp_path)
    assert len(fast_reader.read(["known"], uri)[0].versions) == 1
    assert asked == []


def test_the_client_is_asked_where_it_is_led_elsewhere(
    tmp_path: Path, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = filled(tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    assert len(fast_reader.read(["known"], f"sqlite:///{tmp_path}/other.db")[0].versions) == 1
    assert asked == [f"sqlite:///{tmp_path}/other.db"]


def test_a_database_that_is_not_there_is_not_made_by_looking_at_it(tmp_path: Path, asked: list[str | None]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert fast_reader.read(["known"], uri) == [Registered(aliases={}, versions=())]
    assert asked == [uri]


def test_the_client_says_what_is_wrong_with_tables_that_are_not_mlflows(
    tmp_path: Path, asked: list[str | None]
) -> None:
    uri = filled(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE registered_model_aliases")
    with pytest.raises(TrackingError, match="the registry refused"):
        fast_reader.read(["known"], uri)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("uri", "environment"),
    [
        (None, "sqlite:///{folder}/mlflow.db"),
        (None, ""),
        ("sqlite:///{folder}/mlflow.db", "sqlite:///{folder}/absent.db"),
    ],
)
def test_a_store_is_found_as_mlflow_finds_it(
    uri: str | None, environment: str, tmp_path: Path, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment.format(folder=tmp_path))
    [found] = fast_reader.read(["known"], uri.format(folder=tmp_path) if uri else None)
    assert len(found.versions) == 1
    assert asked == []


# servers that do not answer as MLflow's


class Stranger(BaseHTTPRequestHandler):
    """Answers everything with one status and body, and keeps what it was asked with."""

    status, body, seen = 200, b"", ""

    def do_GET(self) -> None:
        type(self).seen = self.headers.get("Authorization", "")
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def stranger() -> Iterator[tuple[str, type[Stranger]]]:
    handler = type("Own", (Stranger,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, b"who are you?"), (404, b"<html>"), (404, b'{"error_code": "OTHER"}'), (200, b"<html>log in</html>")],
)
def test_a_strangers_answer_is_no_empty_registry(
    stranger: tuple[str, type[Stranger]], status: int, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, handler = stranger
    handler.status, handler.body = status, body
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="the registry refused"):
        fast_reader.read(["known"], uri)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ""),
        ({"USERNAME": "me", "PASSWORD": "secret"}, "Basic bWU6c2VjcmV0"),
        ({"TOKEN": "t"}, "Bearer t"),
        ({"USERNAME": "me", "PASSWORD": "secret", "TOKEN": "t"}, "Basic bWU6c2VjcmV0"),
    ],
)
def test_a_server_is_told_who_asks_as_mlflow_tells_it(
    stranger: tuple[str, type[Stranger]], given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, handler = stranger
    handler.body = json.dumps({"registered_model": {}}).encode()
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    assert fast_reader.by_rest(uri, ["known"]) == [Registered(aliases={}, versions=())]
    assert handler.seen == expected
    fast_reader.by_client(uri, ["known"])
    assert handler.seen == expected
