"""Sweep, promote and roll back on MLflow servers with PostgreSQL, S3 artifacts and basic authentication."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import MlflowServer
from support.postgresql import Postgres
from support.sweeping import STUDY, prepare

from edgeopt.core import mlflow_tags as tags

BUCKET = "engines"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
ADMIN, PASSWORD = "admin", "a-password-of-many-letters"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Yield the environment variables of a private S3 server with a bucket."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {**CREDENTIALS, "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    client = boto3.client(
        "s3",
        endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=BUCKET)
    yield environment
    server.stop()


@dataclass(frozen=True, kw_only=True)
class Stack:
    """MLflow server, with the working folder and environment variables of its clients."""

    server: MlflowServer
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run a command that must end with exit code `code` and not print the password; return its JSON document."""
        command = [sys.executable, "-m", "edgeopt.cli", *arguments, "--config-dir", str(self.folder), "--json"]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EDGEOPT_", "AWS_"))}
        environment = {**inherited, "MLFLOW_TRACKING_URI": self.server.uri, **self.environment}
        process = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert process.returncode == code, process.stderr
        password = self.environment.get("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert password not in process.stdout + process.stderr
        return json.loads(process.stdout) if process.stdout.strip() else {}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("proxied artifacts, basic-auth", marks=pytest.mark.slow),  # each password check is slow
        "direct S3 artifacts",
    ],
)
def stack(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    shared_cache: Path,
    postgresql: Postgres,
    s3: dict[str, str],
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    prepare(folder, tiny_model, cache=shared_cache)
    store = postgresql.database().replace("postgresql://", "postgresql+psycopg://")
    if request.param == "direct S3 artifacts":
        root = ("--default-artifact-root", f"s3://{BUCKET}/direct", "--no-serve-artifacts")
        server = MlflowServer(folder, *root, store=store, environment=s3)
        stack = Stack(server=server, folder=folder, environment=s3)
    else:
        pytest.importorskip("flask_wtf", reason="pip install 'mlflow[auth]'")
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = {ADMIN}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        auth = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for a test"}
        server = MlflowServer(
            folder,
            "--app-name",
            "basic-auth",
            store=store,
            artifacts=f"s3://{BUCKET}/proxied",
            environment={**s3, **auth},
        )
        login = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        stack = Stack(server=server, folder=folder, environment=login)
    try:
        yield stack
    finally:
        server.kill()


@pytest.fixture(scope="module")
def swept(stack: Stack) -> dict[str, Any]:
    """Return the document of a sweep that promoted its front."""
    return stack.run("sweep", "--config-name", "tiny_sweep")


def test_sweep_logs_and_promotes(stack: Stack, swept: dict[str, Any]) -> None:
    assert len(swept["trials"]) == 5
    assert swept["champion"]["name"] == "tiny"
    assert swept["champion"]["trial"] in swept["front"]
    assert {release["number"] for release in swept["promotion"]["releases"]} == set(swept["front"])
    assert stack.run("audit", "tiny")["faults"] == []


def test_version_is_verified_pulled_and_rolled_back(stack: Stack, swept: dict[str, Any], tmp_path: Path) -> None:
    assert all(check["passed"] for check in stack.run("verify", "tiny@champion")["checks"])
    assert stack.run("pull", "tiny@champion", str(tmp_path / "engine"))["recorded"]
    assert (tmp_path / "engine" / "edgeopt.json").is_file()
    first = swept["champion"]["version"]
    stack.run("approve", f"tiny/{first}", "--reason", "I made it", code=4)
    rollback = ("rollback", "tiny@champion", "--policy", "tiny", "--reason", "it is worse")
    stack.run(*rollback, code=4)

    overrides = ("search.study=second", "search.trials=1", "search.enqueue=[{recipe:fp16}]")
    second = stack.run("sweep", "--config-name", "tiny_sweep", *overrides)
    assert second["champion"]["version"] != first
    assert stack.run(*rollback)["after"] == first
    assert stack.run("audit", "tiny")["faults"] == []


def test_dominated_engine_can_be_rebuilt(stack: Stack, swept: dict[str, Any]) -> None:
    assert stack.run("gc", STUDY, "--dry-run")["released"] == []
    dominated = [t for t in swept["trials"] if t["feasible"] and t["number"] not in swept["front"]]
    assert dominated, "the tiny sweep has dominated trials"
    rebuilt = stack.run("rebuild", dominated[0]["run_id"])
    assert rebuilt["same"]


def test_failed_login_shows_no_secrets(stack: Stack) -> None:
    if "MLFLOW_TRACKING_PASSWORD" not in stack.environment:
        pytest.skip("this server has no authentication")
    unauthorized = Stack(
        server=stack.server,
        folder=stack.folder,
        environment={"MLFLOW_TRACKING_USERNAME": "eve", "MLFLOW_TRACKING_PASSWORD": "guessed-password"},
    )
    unauthorized.run("sweep", "--config-name", "tiny_sweep", "search.study=other", code=1)


def test_runs_have_datasets_and_tables(stack: Stack, swept: dict[str, Any], monkeypatch: Any) -> None:
    from mlflow import MlflowClient

    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(tracking_uri=stack.server.uri)
    run = client.get_run(swept["trials"][0]["run_id"])
    assert {i.tags[0].value for i in run.inputs.dataset_inputs} == {"calibration", "evaluation"}
    tables = {file.path for file in client.list_artifacts(run.info.run_id, "tables")}
    assert {"tables/checks.json", "tables/layers.json", "tables/samples.json", "tables/worst_documents.json"} <= tables
    assert run.data.tags[tags.STUDY] == STUDY
