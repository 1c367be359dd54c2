"""What a registry says of its models, read without MLflow's client, whose import takes longer than all the rest.

A server is asked by MLflow's REST interface, a database by its tables. Whatever either of them does not answer is left
to the client, which answers, or says why it cannot.
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
from edgeopt.release.registry.types import ABSENT, Registered, Version

_DEFAULT = "sqlite:///mlflow.db"
_OLDER_DEFAULT = "mlruns"
_CLIENTS_OWN = (
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
"""Variables that lead MLflow's client elsewhere or identify it otherwise than by a password or a token."""
_PAGE = 1000
_TIMEOUT_S = (2, 30)


def read(names: Sequence[str], tracking_uri: str | None = None) -> list[Registered]:
    """The models with these names, in the order in which they are read. TrackingError where nothing answers."""
    source = _source(_resolved(tracking_uri))
    try:
        if source is not None:
            return source(names)
    except (requests.RequestException, sqlalchemy.exc.SQLAlchemyError):
        pass  # the client is asked
    return by_client(tracking_uri, names)


def champion(name: str, tracking_uri: str | None = None, *, study: str | None = None) -> Champion | None:
    """Return the champion of the registered model `name`; None if the alias does not exist.

    With `study`, a champion that comes from another study counts as none.
    """
    [model] = read([name], tracking_uri)
    number = model.aliases.get("champion")
    labels = {version.number: version.tags for version in model.versions}.get(number or "", {})
    if number is None or study not in (None, labels.get(tags.STUDY)):
        return None
    trial = labels.get(tags.TRIAL, "").rpartition("/")[2]
    return Champion(name=name, version=number, trial=int(trial) if trial.isdigit() else None)


def unregistered(name: str) -> InputError:
    """Return the error for an unregistered model name."""
    return InputError(f"no model {name!r} is registered", location="NAME", hint="Promote a study: `edgeopt promote`")


def by_client(tracking_uri: str | None, names: Sequence[str]) -> list[Registered]:
    """By MLflow's own client, of any store that it knows."""
    from edgeopt.release.registry import client as registry

    with registry.answering(tracking_uri) as client:
        return [registry.registered(client, name) for name in names]


def by_rest(uri: str, names: Sequence[str]) -> list[Registered]:
    """By MLflow's REST interface, https://mlflow.org/docs/latest/api_reference/rest-api.html.

    Raises requests.RequestException where it is not answered as expected.
    """
    with requests.Session() as session:
        user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
        if user:
            session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token:
            session.headers["Authorization"] = f"Bearer {token}"
        return [
            Registered(
                aliases=_served_aliases(session, uri, name), versions=tuple(_served_versions(session, uri, name))
            )
            for name in names
        ]


def _served_aliases(session: requests.Session, uri: str, name: str) -> dict[str, str]:
    answer = _get(session, uri, "registered-models/get", name=name)
    if answer.status_code == HTTPStatus.NOT_FOUND and answer.json().get("error_code") in ABSENT:
        return {}
    answer.raise_for_status()
    return {alias["alias"]: str(alias["version"]) for alias in answer.json()["registered_model"].get("aliases", ())}


def _served_versions(session: requests.Session, uri: str, name: str) -> list[Version]:
    found: list[Any] = []
    wanted = {"filter": f"name = '{name}'", "max_results": str(_PAGE)}
    while True:
        answer = _get(session, uri, "model-versions/search", **wanted)
        answer.raise_for_status()
        page = answer.json()
        found += page.get("model_versions", ())
        if not page.get("next_page_token"):
            break
        wanted["page_token"] = page["next_page_token"]
    found.sort(key=lambda version: int(version["version"]))
    return [
        Version(
            number=str(version["version"]),
            run_id=version.get("run_id", ""),
            tags={tag["key"]: tag.get("value", "") for tag in version.get("tags", ())},
        )
        for version in found
    ]


def _get(session: requests.Session, uri: str, path: str, **wanted: str) -> requests.Response:
    return session.get(f"{uri.rstrip('/')}/api/2.0/mlflow/{path}", params=wanted, timeout=_TIMEOUT_S)


def by_database(uri: str, names: Sequence[str]) -> list[Registered]:
    """By MLflow's own tables, which a test compares with what its client says.

    Raises sqlalchemy.exc.SQLAlchemyError where the database does not answer or its tables are others.
    """
    engine = sqlalchemy.create_engine(uri, poolclass=NullPool)
    with engine.connect() as connection:
        return [_stored(connection, name) for name in names]


def _stored(connection: sqlalchemy.Connection, name: str) -> Registered:
    held: dict[int, dict[str, str]] = {}
    for number, key, value in connection.execute(_TAGS, {"name": name}):
        held.setdefault(number, {})[key] = value
    return Registered(
        aliases={alias: str(number) for alias, number in connection.execute(_ALIASES, {"name": name})},
        versions=tuple(
            Version(number=str(number), run_id=run_id or "", tags=held.get(number, {}))
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


def _resolved(tracking_uri: str | None) -> str:
    """The URI as MLflow resolves it; empty where only its client knows."""
    given = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or ("" if Path(_OLDER_DEFAULT).exists() else _DEFAULT)


def _source(uri: str) -> Callable[[Sequence[str]], list[Registered]] | None:
    """The quick way to what lies at `uri`; None where there is none."""
    if any(os.environ.get(name) for name in _CLIENTS_OWN):
        return None
    if urlsplit(uri).scheme in ("http", "https"):
        return partial(by_rest, uri)
    try:
        url = make_url(uri)
    except sqlalchemy.exc.ArgumentError:
        return None
    if url.get_backend_name() != "sqlite" or Path(url.database or "").is_file():
        return partial(by_database, uri)
    return None
