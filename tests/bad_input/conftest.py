"""Provide fixtures and damaged files for the tests of bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeopt.cli.main import main

ErrorOf = Callable[..., str]
Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the test's own working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> ErrorOf:
    """Return a function that runs a failing command and returns its only line on stderr.

    The function checks the exit code and that stdout is empty.
    """

    def run(*arguments: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("edgeopt: ")
        assert not [noise for noise in ("Traceback", "search path", "full_key", "$KEY", "--debug") if noise in line]
        return line.removeprefix("edgeopt: ")

    return run


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of an MLflow store with the model `known`; its only version has the alias `champion`."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("known")
    client.create_model_version("known", source=folder.as_uri())
    client.set_registered_model_alias("known", "champion", "1")
    return uri


def remove(name: str) -> Damage:
    """Return a function that removes the file `name` of a folder."""
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, content: bytes) -> Damage:
    """Return a function that replaces the content of the file `name` of a folder."""
    return lambda folder: (folder / name).write_bytes(content)
