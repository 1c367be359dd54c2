"""The MLflow registry by its own client: URIs, versions, engines inside registered models."""

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
from edgeopt.release.registry.types import ABSENT, Registered, Version

_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))")
_OWN = "MLFLOW_TRACKING_URI"
_PAGE = 1000

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


@contextlib.contextmanager
def answering(tracking_uri: str | None) -> Iterator[MlflowClient]:
    """A client of the store; what MLflow or its database refuses becomes a TrackingError."""
    uri = tracking_uri or mlflow.get_tracking_uri()
    try:
        with _as_mlflows_own(uri):
            yield MlflowClient(tracking_uri=uri)
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise TrackingError(f"the registry refused: {first_line(error)}", location=redact_password(uri)) from error


@contextlib.contextmanager
def _as_mlflows_own(uri: str) -> Iterator[None]:
    """MLflow's registry looks logged models up under the process's own URI, not under that of its client."""
    before = os.environ.get(_OWN)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ[_OWN] = before


def registered(client: MlflowClient, name: str) -> Registered:
    """Aliases and versions of a registered model; nothing where it does not exist."""
    found = versions(client, name)
    return Registered(
        aliases=aliases(client, name),
        versions=tuple(Version(number=str(v.version), run_id=v.run_id or "", tags=v.tags) for v in found),
    )


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias → version of the registered model; empty where the model does not exist."""
    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code in ABSENT:
            return {}
        raise


def versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a registered model by number; empty where it does not exist."""
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def ensure_model(client: MlflowClient, name: str, description: str) -> None:
    """Make the registered model where it is absent."""
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A version of a registered model by number or by alias; neither names the model alone."""

    name: str
    alias: str = ""
    version: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Of `NAME@ALIAS` or `NAME/VERSION`, with `models:/` before it or without."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            hint = "Give models:/NAME@ALIAS or models:/NAME/VERSION"
            raise InputError(f"{text!r} is no registry URI", location="uri", hint=hint)
        return cls(name=match["name"], alias=match["alias"] or "", version=match["version"] or "")

    def find(self, client: MlflowClient) -> ModelVersion:
        """Raises InputError, with what there is, where the model, alias or version does not exist."""
        try:
            model = client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            known = ", ".join(m.name for m in client.search_registered_models(max_results=20)) or "none yet"
            what = f"no model {self.name!r} is registered"
            raise InputError(what, location="uri", hint=f"Registered are: {known}") from error
        if self.alias and self.alias not in model.aliases:
            known = ", ".join(sorted(model.aliases)) or "none yet"
            raise InputError(
                f"model {self.name!r} has no alias {self.alias!r}", location="uri", hint=f"Its aliases: {known}"
            )
        number = str(model.aliases[self.alias]) if self.alias else self.version
        try:
            return client.get_model_version(self.name, number)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            known = ", ".join(str(version.version) for version in versions(client, self.name)[-20:]) or "none"
            what = f"model {self.name!r} has no version {number}"
            raise InputError(what, location="uri", hint=f"Its versions: {known}") from error


def resolve(uri: str, tracking_uri: str | None = None, destination: Path | None = None) -> Path:
    """The local folder of the engine behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, verified.

    Args:
        destination: folder that takes a download; without it a temporary one, or none where the store is local.

    Raises InputError where the model, version or alias does not exist, or its engine was changed.
    """
    reference = Reference.parse(uri)
    with answering(tracking_uri) as client:
        return fetch(reference.find(client), destination).directory


def fetch(version: ModelVersion, destination: Path | None = None) -> Engine:
    """The engine of a version, compared with what was registered.

    Raises InputError where it has none, or where a file, the manifest or the version was changed.
    """
    pinned = f"models:/{version.name}/{version.version}"
    try:
        target = None if destination is None else str(destination)
        folder = Path(mlflow.artifacts.download_artifacts(pinned, dst_path=target))
    except (MlflowException, OSError) as error:
        hint = "Register it with edgeopt promote"
        raise InputError(f"{pinned} has no artifacts ({first_line(error)})", location="uri", hint=hint) from error
    engine = Engine.read(engine_folder(folder))
    engine.verify()
    for what, tag, found in (
        ("digest", tags.ENGINE_DIGEST, engine.digest),
        ("manifest's sha256", tags.MANIFEST_SHA256, engine.manifest_sha256),
    ):
        expected = version.tags.get(tag, found)
        if found != expected:
            raise InputError(
                f"the engine of {pinned} is not the one that was registered: its {what} is {found}, not {expected}",
                location=str(engine.directory),
                hint="Use another version, and find out who changed it",
            )
    return engine


def engine_folder(model_folder: Path) -> Path:
    """The engine inside a downloaded MLflow model. Raises InputError where it holds none of edgeopt's flavor."""
    try:
        flavors = Model.load(str(model_folder)).flavors
    except (MlflowException, OSError) as error:
        hint = "Promote a study to make one"
        raise InputError("this is no MLflow model", location=str(model_folder), hint=hint) from error
    if tags.FLAVOR not in flavors or "python_function" not in flavors:
        raise InputError(
            f"the model has no edgeopt flavor, only: {', '.join(flavors) or 'none'}",
            location=str(model_folder),
            hint="Name a model that edgeopt promote registered",
        )
    return model_folder / str(flavors[tags.FLAVOR]["data"])
