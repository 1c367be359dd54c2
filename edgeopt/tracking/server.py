"""Connect to an MLflow server or store, report its errors as edgeopt errors, and fail within seconds if it is down."""

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
MLFLOW_ERRORS = (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)
"""Errors that MLflow, its database and its artifact store raise."""
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_TIMEOUT_ARGUMENT = {"sqlite": "timeout", "mssql": "timeout"}
# without this tag the UI opens the experiment with its pages for LLM traces
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_HINT = "Start the server, or set MLFLOW_TRACKING_URI or tracking.tracking_uri to a running one"

# stdout is reserved for results, and a sweep shows its own progress
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# by default MLflow retries for four minutes and blocks the sweep; edgeopt has its own retries
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def resolve_uri(tracking_uri: str | None) -> str:
    """Return `tracking_uri`, or else MLFLOW_TRACKING_URI, or else MLflow's default SQLite file."""
    return tracking_uri or mlflow.get_tracking_uri()


def absolute_uri(uri: str) -> str:
    """Return `uri` with an absolute path if it names a SQLite file."""
    file = _sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.absolute()}"


@contextlib.contextmanager
def connect(uri: str) -> Iterator[MlflowClient]:
    """Yield a client of `uri` and convert MLflow's errors.

    The health of a server is checked first, because MLflow's own client waits minutes for a server that hangs.

    Raises UnreachableError within seconds if nothing answers, TrackingError if MLflow, its database or its artifact
    store rejects a request.
    """
    try:
        _check_health(uri)
        yield MlflowClient(tracking_uri=uri)
    except MLFLOW_ERRORS as error:
        raise _to_edgeopt_error(uri, error) from error


def probe(uri: str) -> None:
    """Check that a store answers, and create the tables of a missing SQLite file.

    Raises UnreachableError within about ten seconds if nothing answers at `uri`.
    """
    try:
        if is_server(uri):
            _probe_http(uri)
        elif urlsplit(uri).scheme.split("+")[0] in _DATABASES:
            _probe_database(uri)
    except ImportError as error:
        raise TrackingError(
            f"the driver of the database must be installed, got: {error}",
            location=redact_password(uri),
            hint="Install it; for PostgreSQL: pip install 'edgeopt[postgres]'",
        ) from error
    except MLFLOW_ERRORS as error:
        raise _unreachable(uri, error) from error


def is_server(uri: str) -> bool:
    """Return True if `uri` is the address of an MLflow server, False if it names a database."""
    return urlsplit(uri).scheme in ("http", "https")


def _check_health(uri: str) -> None:
    """Raise an error if a server does not answer. A database is not checked: its first query fails if it is down."""
    if is_server(uri):
        health = http_request(
            get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=PROBE_S, raise_on_status=False
        )
        if health.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise requests.HTTPError(f"{health.status_code} {health.reason}")


def _to_edgeopt_error(uri: str, error: Exception) -> TrackingError:
    if isinstance(error, (requests.RequestException, sqlalchemy.exc.OperationalError)):
        return _unreachable(uri, error)
    try:
        _check_health(uri)
    except MLFLOW_ERRORS as health_error:
        return _unreachable(uri, health_error)
    return TrackingError(f"MLflow rejected the request: {first_line(error)}", location=redact_password(uri))


def _unreachable(uri: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"MLflow does not answer ({first_line(error)})", location=redact_password(uri), hint=_HINT)


def _probe_http(uri: str) -> None:
    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(PROBE_S)):
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _probe_database(uri: str) -> None:
    url = make_url(uri)
    argument = _TIMEOUT_ARGUMENT.get(url.get_backend_name(), "connect_timeout")
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        _create_sqlite(database)
    engine = sqlalchemy.create_engine(url, connect_args={argument: PROBE_S})
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _create_sqlite(database: Path) -> None:
    """Create MLflow's tables in a temporary file, and link it to its name when complete.

    MLflow cannot repair a schema whose creation was interrupted.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=f".{database.name}-") as folder:
        draft = Path(folder) / database.name
        MlflowClient(tracking_uri=f"sqlite:///{draft.resolve()}").search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(draft)) as connection:
            # with a write-ahead log, readers do not wait for a writer; SQLite ignores this without shared memory
            connection.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # another process created it first
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


def get_or_create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of the experiment `name`, creating it if it does not exist.

    If the store is a SQLite file, artifacts go into the folder of that file, not into the working folder.

    Raises TrackingError if the experiment was deleted.
    """
    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            return str(
                client.create_experiment(name, artifact_location=_artifact_folder(uri, name), tags=_EXPERIMENT_TAGS)
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process created it first
                raise
            existing = client.get_experiment_by_name(name)
    if existing is None or existing.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} must be active, but it was deleted",
            location=redact_password(uri),
            hint="Restore it with `mlflow experiments restore`, or set tracking.experiment to another name",
        )
    return str(existing.experiment_id)


def _artifact_folder(uri: str, name: str) -> str | None:
    """Return a folder next to the SQLite file; None if the store is not a SQLite file."""
    database = _sqlite_file(uri)
    return None if database is None else str(database.parent / "mlruns" / re.sub(r"[^\w.-]+", "_", name))


def _sqlite_file(uri: str) -> Path | None:
    if urlsplit(uri).scheme.split("+")[0] != "sqlite":
        return None
    database = make_url(uri).database
    return Path(database).resolve() if database and database != ":memory:" else None
