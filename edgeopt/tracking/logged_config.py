"""Read from a run what is needed to build its engine again."""

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
class LoggedConfig:
    """The config of a trial and the environment that built its engine.

    Attributes:
        config: the composed config of the trial.
        engine_digest: digest of the engine that was built.
        versions: versions of the libraries that built it.
        git_commit: commit of the checkout that built it; empty if it was built outside a git repository.
    """

    config: Mapping[str, Any]
    engine_digest: str
    versions: Mapping[str, str]
    git_commit: str


def read_logged_config(run_id: str, tracking_uri: str | None = None) -> LoggedConfig:
    """Read the config and the versions of a trial's run.

    Raises InputError if the run does not exist or did not build an engine.
    """
    with server.connect(server.resolve_uri(tracking_uri)) as client:
        try:
            run_tags = client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise InputError(
                f"the run {run_id!r} does not exist", location="run", hint="Copy the run id from the MLflow UI"
            ) from error
        if tags.ENGINE_DIGEST not in run_tags:
            raise InputError(
                f"the run {run_id!r} did not build an engine", location="run", hint="Name the run of a measured trial"
            )
        with TemporaryDirectory() as scratch:
            config = yaml.safe_load(Path(client.download_artifacts(run_id, "config.yaml", scratch)).read_text())
    return LoggedConfig(
        config=config,
        engine_digest=run_tags[tags.ENGINE_DIGEST],
        versions=_versions(run_tags),
        git_commit=run_tags.get(tags.GIT_COMMIT, ""),
    )


def current_versions() -> dict[str, str]:
    """Return the library versions of this environment, as a run would record them."""
    return _versions(mlflow_fields.environment_tags())


def _versions(run_tags: Mapping[str, str]) -> dict[str, str]:
    prefix = tags.VERSION_PREFIX
    return {name.removeprefix(prefix): value for name, value in run_tags.items() if name.startswith(prefix)}
