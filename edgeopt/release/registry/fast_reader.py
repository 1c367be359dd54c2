"""Read registered models without MLflow's client, because its import takes longer than the reading.

A server is read through MLflow's REST API, and a database through its tables. If that fails, MLflow's client reads the
store or raises the error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.study_snapshot import Champion
from edgeopt.errors import InputError
from edgeopt.release.registry.types import NOT_FOUND_CODES, RegisteredModel, RegisteredVersion

_DEFAULT_URI = "sqlite:///mlflow.db"
_FORMER_DEFAULT_FOLDER = "mlruns"
_CLIENT_ONLY_VARIABLES = (
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
"""Environment variables that only MLflow's client supports: other stores, and other authentication."""
_PAGE_SIZE = 1000
_TIMEOUT_S = (2, 30)


def read_models(names: Sequence[str], tracking_uri: str | None = None) -> list[RegisteredModel]:
    """Return the registered models with these names, in this order. Raises TrackingError if the store fails."""
    read_fast = _fast_reader(_tracking_uri(tracking_uri))
    try:
        if read_fast is not None:
            return read_fast(names)
    except (requests.RequestException, sqlalchemy.exc.SQLAlchemyError):
        pass  # the client tries, or raises the error
    return read_by_client(tracking_uri, names)


def champion(name: str, tracking_uri: str | None = None, *, study: str | None = None) -> Champion | None:
    """Return the champion of the registered model `name`; None if the alias does not exist.

    With `study`, a champion that comes from another study counts as none.
    """
    [model] = read_models([name], tracking_uri)
    number = model.aliases.get("champion")
    version_tags = {version.number: version.tags for version in model.versions}.get(number or "", {})
    if number is None or study not in (None, version_tags.get(tags.STUDY)):
        return None
    trial = version_tags.get(tags.TRIAL, "").rpartition("/")[2]
    return Champion(name=name, version=number, trial=int(trial) if trial.isdigit() else None)


def unregistered_model_error(name: str) -> InputError:
    """Return the error for an unregistered model name."""
    return InputError(f"no model {name!r} is registered", location="NAME", hint="Promote a study: `edgeopt promote`")


def read_by_client(tracking_uri: str | None, names: Sequence[str]) -> list[RegisteredModel]:
    """Read registered models with MLflow's client, which supports every kind of store."""
    from edgeopt.release.registry import client as registry

    with registry.connect(tracking_uri) as client:
        return [registry.read_model(client, name) for name in names]


def read_by_rest(uri: str, names: Sequence[str]) -> list[RegisteredModel]:
    """Read registered models through MLflow's REST API, https://mlflow.org/docs/latest/api_reference/rest-api.html.

    Raises requests.RequestException if the server does not give the expected answer.
    """
    with requests.Session() as session:
        user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
        if user:
            session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token:
            session.headers["Authorization"] = f"Bearer {token}"
        return [
            RegisteredModel(
                aliases=_rest_aliases(session, uri, name), versions=tuple(_rest_versions(session, uri, name))
            )
            for name in names
        ]


def _rest_aliases(session: requests.Session, uri: str, name: str) -> dict[str, str]:
    response = _get(session, uri, "registered-models/get", name=name)
    if response.status_code == HTTPStatus.NOT_FOUND and response.json().get("error_code") in NOT_FOUND_CODES:
        return {}
    response.raise_for_status()
    return {alias["alias"]: str(alias["version"]) for alias in response.json()["registered_model"].get("aliases", ())}


def _rest_versions(session: requests.Session, uri: str, name: str) -> list[RegisteredVersion]:
    found: list[Any] = []
    params = {"filter": f"name = '{name}'", "max_results": str(_PAGE_SIZE)}
    while True:
        response = _get(session, uri, "model-versions/search", **params)
        response.raise_for_status()
        page = response.json()
        found += page.get("model_versions", ())
        if not page.get("next_page_token"):
            break
        params["page_token"] = page["next_page_token"]
    found.sort(key=lambda version: int(version["version"]))
    return [
        RegisteredVersion(
            number=str(version["version"]),
            run_id=version.get("run_id", ""),
            tags={tag["key"]: tag.get("value", "") for tag in version.get("tags", ())},
        )
        for version in found
    ]


def _get(session: requests.Session, uri: str, path: str, **params: str) -> requests.Response:
    return session.get(f"{uri.rstrip('/')}/api/2.0/mlflow/{path}", params=params, timeout=_TIMEOUT_S)


def read_from_database(uri: str, names: Sequence[str]) -> list[RegisteredModel]:
    """Read registered models from MLflow's tables. A test compares the result with that of MLflow's client.

    Raises sqlalchemy.exc.SQLAlchemyError if the database fails or has other tables.
    """
    engine = sqlalchemy.create_engine(uri, poolclass=NullPool)
    with engine.connect() as connection:
        return [_select_model(connection, name) for name in names]


def _select_model(connection: sqlalchemy.Connection, name: str) -> RegisteredModel:
    version_tags: dict[int, dict[str, str]] = {}
    for number, key, value in connection.execute(_TAGS, {"name": name}):
        version_tags.setdefault(number, {})[key] = value
    return RegisteredModel(
        aliases={alias: str(number) for alias, number in connection.execute(_ALIASES, {"name": name})},
        versions=tuple(
            RegisteredVersion(number=str(number), run_id=run_id or "", tags=version_tags.get(number, {}))
            for number, run_id in connection.execute(_VERSIONS, {"name": name})
        ),
    )


_ALIASES = sqlalchemy.text(
    "SELECT alias, version FROM registered_model_aliases WHERE workspace = 'default' AND name = :name"
)
_VERSIONS = sqlalchemy.text(
    "SELECT version, run_id FROM model_versions "
    "WHERE workspace = 'default' AND name = :name AND current_stage <> 'Deleted_Internal' ORDER BY version"
)
_TAGS = sqlalchemy.text(
    "SELECT version, key, value FROM model_version_tags WHERE workspace = 'default' AND name = :name"
)


def _tracking_uri(tracking_uri: str | None) -> str:
    """Return the tracking URI by MLflow's rules; empty if only MLflow's client can resolve it."""
    explicit = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return explicit or ("" if Path(_FORMER_DEFAULT_FOLDER).exists() else _DEFAULT_URI)


def _fast_reader(uri: str) -> Callable[[Sequence[str]], list[RegisteredModel]] | None:
    """Return the function that reads the store at `uri` without MLflow's client; None if there is none."""
    if any(os.environ.get(name) for name in _CLIENT_ONLY_VARIABLES):
        return None
    if urlsplit(uri).scheme in ("http", "https"):
        return partial(read_by_rest, uri)
    try:
        url = make_url(uri)
    except sqlalchemy.exc.ArgumentError:
        return None
    if url.get_backend_name() != "sqlite" or Path(url.database or "").is_file():
        return partial(read_from_database, uri)
    return None
