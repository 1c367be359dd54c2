"""What a run keeps to build its engine again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from mlflow.exceptions import MlflowException

from edgeopt.core import mlflow_tags as tags
from edgeopt.errors import InputError
from edgeopt.tracking import mlflow_fields, server


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """Attributes:
    config: the composed config of the trial.
    engine_digest: of the engine that was built of it.
    versions: of the libraries that built it.
    git_commit: commit of the checkout that built it; empty if it was none.
    """

    config: Mapping[str, Any]
    engine_digest: str
    versions: Mapping[str, str]
    git_commit: str


def logged(run_id: str, tracking_uri: str | None = None) -> Logged:
    """Raises InputError where there is no such run, or it is of no trial that built an engine."""
    with server.answering(server.resolve(tracking_uri)) as client:
        try:
            labels = client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise InputError(
                f"there is no run {run_id!r}", location="run", hint="Copy its id from the MLflow UI"
            ) from error
        if tags.ENGINE_DIGEST not in labels:
            raise InputError(
                f"run {run_id!r} built no engine", location="run", hint="Name the run of a trial that was measured"
            )
        with TemporaryDirectory() as scratch:
            config = yaml.safe_load(Path(client.download_artifacts(run_id, "config.yaml", scratch)).read_text())
    found = {k.removeprefix(tags.VERSION_PREFIX): v for k, v in labels.items() if k.startswith(tags.VERSION_PREFIX)}
    return Logged(
        config=config,
        engine_digest=labels[tags.ENGINE_DIGEST],
        versions=found,
        git_commit=labels.get(tags.GIT_COMMIT, ""),
    )


def versions() -> dict[str, str]:
    """Those of this environment, as a run would keep them."""
    now = mlflow_fields.surroundings()
    return {k.removeprefix(tags.VERSION_PREFIX): v for k, v in now.items() if k.startswith(tags.VERSION_PREFIX)}
