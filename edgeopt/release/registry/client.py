"""Access the MLflow registry through MLflow's client: references, versions, and engines in registered models."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.artifact import Engine
from edgeopt.core.redaction import redact_password
from edgeopt.errors import InputError, TrackingError, first_line
from edgeopt.release.registry.types import NOT_FOUND_CODES, RegisteredModel, RegisteredVersion

_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))")
_TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_PAGE_SIZE = 1000

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


@contextlib.contextmanager
def connect(tracking_uri: str | None) -> Iterator[MlflowClient]:
    """Yield a client of the store. Inside the block, an error of MLflow or its database becomes a TrackingError."""
    uri = tracking_uri or mlflow.get_tracking_uri()
    try:
        with _process_tracking_uri(uri):
            yield MlflowClient(tracking_uri=uri)
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise TrackingError(f"the registry failed: {first_line(error)}", location=redact_password(uri)) from error


@contextlib.contextmanager
def _process_tracking_uri(uri: str) -> Iterator[None]:
    """Set the tracking URI of the process: MLflow resolves logged models there, not at the client's URI."""
    before = os.environ.get(_TRACKING_URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ[_TRACKING_URI_VARIABLE] = before


def read_model(client: MlflowClient, name: str) -> RegisteredModel:
    """Return aliases and versions of a registered model; both are empty if it does not exist."""
    return RegisteredModel(
        aliases=aliases(client, name),
        versions=tuple(
            RegisteredVersion(number=str(version.version), run_id=version.run_id or "", tags=version.tags)
            for version in versions(client, name)
        ),
    )


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Return alias to version of a registered model; empty if it does not exist."""
    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code in NOT_FOUND_CODES:
            return {}
        raise


def versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return all versions of a registered model, sorted by number; empty if it does not exist."""
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=_PAGE_SIZE, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def ensure_model(client: MlflowClient, name: str, description: str) -> None:
    """Create the registered model unless it exists."""
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Reference to a version of a registered model, by number or by alias. The other one is empty."""

    name: str
    alias: str = ""
    version: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse `NAME@ALIAS` or `NAME/VERSION`, with or without the prefix `models:/`. Raises InputError."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise InputError(
                f"a reference must be models:/NAME@ALIAS or models:/NAME/VERSION, got {text!r}",
                location="uri",
                hint="Example: models:/edgeopt@champion",
            )
        return cls(name=match["name"], alias=match["alias"] or "", version=match["version"] or "")

    def find(self, client: MlflowClient) -> ModelVersion:
        """Return the version. Raises InputError, with the existing names, if model, alias or version does not exist."""
        try:
            model = client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise
            names = ", ".join(m.name for m in client.search_registered_models(max_results=20)) or "none"
            message = f"no model {self.name!r} is registered"
            raise InputError(message, location="uri", hint=f"Registered models: {names}") from error
        if self.alias and self.alias not in model.aliases:
            names = ", ".join(sorted(model.aliases)) or "none"
            raise InputError(
                f"model {self.name!r} has no alias {self.alias!r}", location="uri", hint=f"Existing aliases: {names}"
            )
        number = str(model.aliases[self.alias]) if self.alias else self.version
        try:
            return client.get_model_version(self.name, number)
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise
            numbers = ", ".join(str(version.version) for version in versions(client, self.name)[-20:]) or "none"
            message = f"model {self.name!r} has no version {number}"
            raise InputError(message, location="uri", hint=f"Existing versions: {numbers}") from error


def resolve(uri: str, tracking_uri: str | None = None, destination: Path | None = None) -> Path:
    """Return the local folder of a registered engine after verifying it.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        destination: folder for a download. Default: a temporary folder, or no download from a local store.

    Raises InputError if the model, alias or version does not exist, or if the engine was changed.
    """
    reference = Reference.parse(uri)
    with connect(tracking_uri) as client:
        return fetch_engine(reference.find(client), destination).directory


def fetch_engine(version: ModelVersion, destination: Path | None = None) -> Engine:
    """Return the engine of a version after comparing it with the registered digests.

    Raises InputError if the version has no engine, or if a file, the manifest or the version was changed.
    """
    uri = f"models:/{version.name}/{version.version}"
    try:
        target = None if destination is None else str(destination)
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=target))
    except (MlflowException, OSError) as error:
        message = f"the artifacts of {uri} cannot be fetched ({first_line(error)})"
        raise InputError(message, location="uri", hint="Register an engine with `edgeopt promote`") from error
    engine = Engine.read(engine_folder(folder))
    require_registered(engine, version)
    return engine


def require_registered(engine: Engine, version: ModelVersion) -> None:
    """Raise InputError unless the files of `engine` are those that were registered as `version`."""
    engine.verify()
    for name, tag, actual in (
        ("digest", tags.ENGINE_DIGEST, engine.digest),
        ("manifest's sha256", tags.MANIFEST_SHA256, engine.manifest_sha256),
    ):
        expected = version.tags.get(tag, actual)
        if actual != expected:
            raise InputError(
                f"the engine must be the one that was registered as {version.name}/{version.version}: "
                f"its {name} is {actual}, not {expected}",
                location=str(engine.directory),
                hint="Use another version, and find out who changed this one",
            )


def engine_folder(model_folder: Path) -> Path:
    """Return the engine's folder in a downloaded MLflow model. Raises InputError if the model has no edgeopt flavor."""
    try:
        flavors = Model.load(str(model_folder)).flavors
    except (MlflowException, OSError) as error:
        raise InputError(
            "the folder must contain an MLflow model",
            location=str(model_folder),
            hint="Register one with `edgeopt promote`",
        ) from error
    if tags.FLAVOR not in flavors or "python_function" not in flavors:
        raise InputError(
            f"the model must have the edgeopt flavor, got: {', '.join(flavors) or 'none'}",
            location=str(model_folder),
            hint="Choose a model that `edgeopt promote` registered",
        )
    return model_folder / str(flavors[tags.FLAVOR]["data"])
