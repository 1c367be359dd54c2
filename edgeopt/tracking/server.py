"""Speaking to an MLflow server or store: one client, one kind of error, and an answer within seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.engine import make_url

from edgeopt.core.redaction import redact_password
from edgeopt.errors import TrackingError, UnreachableError, first_line

PROBE_S = 8
REFUSALS = (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)
"""What MLflow raises where it, its database or its artifact store does not do what it was asked for."""
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_TIMEOUT_KEY = {"sqlite": "timeout", "mssql": "timeout"}
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI takes it for chats and agents
_MEND = "Start the server, or set MLFLOW_TRACKING_URI or tracking.tracking_uri to one that answers"

# stdout belongs to results, and a search draws its own progress
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow tries for four minutes else, in which a sweep would stand still; whoever needs an answer asks again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def resolve(tracking_uri: str | None) -> str:
    """The URI to use: the given one, MLFLOW_TRACKING_URI, or MLflow's default local SQLite file."""
    return tracking_uri or mlflow.get_tracking_uri()


def absolute(uri: str) -> str:
    """`uri` as it means the same from every working folder."""
    file = _sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.absolute()}"


@contextlib.contextmanager
def answering(uri: str) -> Iterator[MlflowClient]:
    """A client of `uri`. UnreachableError where nothing answers there, within seconds; TrackingError for what it,
    its database or its artifact store refuses.

    A server is asked first whether it is there, because one that hangs keeps MLflow's own clients for minutes.
    """
    try:
        _ask(uri)
        yield MlflowClient(tracking_uri=uri)
    except REFUSALS as error:
        raise _failure(uri, error) from error


def probe(uri: str) -> None:
    """Raise UnreachableError within some ten seconds where nothing answers at `uri`."""
    try:
        if _served(uri):
            _probe_http(uri)
        elif urlsplit(uri).scheme.split("+")[0] in _DATABASES:
            _probe_database(uri)
    except ImportError as error:
        raise TrackingError(
            f"the driver of this database is not installed ({error})",
            location=redact_password(uri),
            hint="Install it, for PostgreSQL with pip install 'edgeopt[postgres]'",
        ) from error
    except REFUSALS as error:
        raise _unreachable(uri, error) from error


def _served(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _ask(uri: str) -> None:
    """Raise where no server answers; a database answers, or does not, when it is asked for something."""
    if _served(uri):
        health = http_request(
            get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=PROBE_S, raise_on_status=False
        )
        if health.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise requests.HTTPError(f"{health.status_code} {health.reason}")


def _failure(uri: str, error: Exception) -> TrackingError:
    if isinstance(error, (requests.RequestException, sqlalchemy.exc.OperationalError)):
        return _unreachable(uri, error)
    try:
        _ask(uri)
    except REFUSALS as silence:
        return _unreachable(uri, silence)
    return TrackingError(f"MLflow refused: {first_line(error)}", location=redact_password(uri))


def _unreachable(uri: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"MLflow does not answer ({first_line(error)})", location=redact_password(uri), hint=_MEND)


def _probe_http(uri: str) -> None:
    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(PROBE_S)):
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _probe_database(uri: str) -> None:
    url = make_url(uri)
    kind = url.get_backend_name()
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        _create_sqlite(database)
    engine = sqlalchemy.create_engine(url, connect_args={_TIMEOUT_KEY.get(kind, "connect_timeout"): PROBE_S})
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _create_sqlite(database: Path) -> None:
    """Make MLflow's tables in a draft that gets its name when it is whole: MLflow cannot mend half a schema."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=f".{database.name}-") as folder:
        draft = Path(folder) / database.name
        MlflowClient(tracking_uri=f"sqlite:///{draft.resolve()}").search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(draft)) as connection:
            # readers do not wait for a writer then; a file system without shared memory keeps its own way
            connection.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(draft, database)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment `name`, made where it is absent.

    Beside a SQLite file its artifacts lie in the same folder, from wherever a command is started.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_beside_database(uri, name), tags=_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} was deleted",
            location=redact_password(uri),
            hint="Restore it with mlflow experiments restore, or set tracking.experiment to another name",
        )
    return str(found.experiment_id)


def _beside_database(uri: str, name: str) -> str | None:
    database = _sqlite_file(uri)
    return None if database is None else str(database.parent / "mlruns" / re.sub(r"[^\w.-]+", "_", name))


def _sqlite_file(uri: str) -> Path | None:
    if urlsplit(uri).scheme.split("+")[0] != "sqlite":
        return None
    database = make_url(uri).database
    return Path(database).resolve() if database and database != ":memory:" else None
