"""The whole path from a sweep to a rollback on stock MLflow servers: PostgreSQL, S3-like artifacts, basic-auth."""

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
from support.sweeping import prepare

from edgeopt.core import mlflow_tags as tags

BUCKET = "engines"
KEYS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
ADMIN, PASSWORD = "admin", "a-password-of-many-letters"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server of one's own with a bucket."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    client = boto3.client(
        "s3",
        endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id="me",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    yield environment
    server.stop()


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A server, and the environment in which its clients work."""

    server: MlflowServer
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The document of a command, which ends with `code`."""
        command = [sys.executable, "-m", "edgeopt.cli", *arguments, "--config-dir", str(self.folder), "--json"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EDGEOPT_", "AWS_"))}
        given = {"MLFLOW_TRACKING_URI": self.server.uri, **self.environment}
        done = subprocess.run(
            command, cwd=self.folder, env=kept | given, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == code, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        return json.loads(done.stdout) if done.stdout.strip() else {}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("proxied artifacts, basic-auth", marks=pytest.mark.slow),  # checking a password takes its time
        "artifacts straight to S3",
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
    if request.param == "artifacts straight to S3":
        root = ("--default-artifact-root", f"s3://{BUCKET}/straight", "--no-serve-artifacts")
        server = MlflowServer(folder, *root, store=store, environment=s3)
        stack = Stack(server=server, folder=folder, environment=s3)
    else:
        pytest.importorskip("flask_wtf", reason="pip install 'mlflow[auth]'")
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = {ADMIN}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        known = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for a test"}
        server = MlflowServer(
            folder,
            "--app-name",
            "basic-auth",
            store=store,
            artifacts=f"s3://{BUCKET}/proxied",
            environment={**s3, **known},
        )
        who = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        stack = Stack(server=server, folder=folder, environment=who)
    try:
        yield stack
    finally:
        server.kill()


@pytest.fixture(scope="module")
def swept(stack: Stack) -> dict[str, Any]:
    """A sweep of this stack, with the front promoted."""
    return stack.run("sweep", "--config-name", "tiny_sweep")


def test_a_sweep_logs_and_promotes(stack: Stack, swept: dict[str, Any]) -> None:
    assert len(swept["trials"]) == 5
    assert swept["champion"]["name"] == "tiny"
    assert swept["champion"]["trial"] in swept["front"]
    assert {release["number"] for release in swept["promotion"]["releases"]} == set(swept["front"])
    assert stack.run("audit", "tiny")["faults"] == []


def test_a_version_is_verified_pulled_approved_and_rolled_back(
    stack: Stack, swept: dict[str, Any], tmp_path: Path
) -> None:
    assert all(check["passed"] for check in stack.run("verify", "tiny@champion")["checks"])
    assert stack.run("pull", "tiny@champion", str(tmp_path / "engine"))["promised"]
    assert (tmp_path / "engine" / "edgeopt.json").is_file()
    first = swept["champion"]["version"]
    stack.run("approve", f"tiny/{first}", "--reason", "I made it", code=4)
    back = ("rollback", "tiny@champion", "--policy", "tiny", "--reason", "it is worse")
    stack.run(*back, code=4)

    given = ("search.study=second", "search.trials=1", "search.enqueue=[{recipe:fp16}]")
    second = stack.run("sweep", "--config-name", "tiny_sweep", *given)
    assert second["champion"]["version"] != first
    assert stack.run(*back)["after"] == first
    assert stack.run("audit", "tiny")["faults"] == []


def test_engines_off_the_front_can_be_rebuilt(stack: Stack, swept: dict[str, Any]) -> None:
    assert stack.run("gc", "kill", "--dry-run")["released"] == []
    off = [t for t in swept["trials"] if t["feasible"] and t["number"] not in swept["front"]]
    assert off, "the tiny sweep has dominated trials"
    rebuilt = stack.run("rebuild", off[0]["run_id"])
    assert rebuilt["same"]


def test_a_refused_login_is_reported_without_secrets(stack: Stack) -> None:
    if "MLFLOW_TRACKING_PASSWORD" not in stack.environment:
        pytest.skip("this server asks nobody who they are")
    stranger = Stack(
        server=stack.server,
        folder=stack.folder,
        environment={"MLFLOW_TRACKING_USERNAME": "eve", "MLFLOW_TRACKING_PASSWORD": "guessed-by-a-stranger"},
    )
    stranger.run("sweep", "--config-name", "tiny_sweep", "search.study=other", code=1)


def test_runs_hold_their_datasets_and_tables(stack: Stack, swept: dict[str, Any], monkeypatch: Any) -> None:
    from mlflow import MlflowClient

    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(tracking_uri=stack.server.uri)
    run = client.get_run(swept["trials"][0]["run_id"])
    assert {i.tags[0].value for i in run.inputs.dataset_inputs} == {"calibration", "evaluation"}
    kept = {file.path for file in client.list_artifacts(run.info.run_id, "tables")}
    assert {"tables/checks.json", "tables/layers.json", "tables/samples.json", "tables/worst_documents.json"} <= kept
    assert run.data.tags[tags.STUDY] == "kill"
