"""Connect to the database of studies and run short transactions that survive a restart of the database."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy import Connection
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from edgeopt.core.redaction import redact_password
from edgeopt.errors import ConfigError, StoreError, first_line
from edgeopt.search.storage.schema import METADATA, STUDIES

RETRY_S = 120.0
"""Seconds for which a transaction is retried after the database has answered once. A restart takes less."""
FIRST_RETRY_S = 15.0
"""Seconds for which the first transaction is retried: a database that never answered may have a wrong address."""
_RETRY_PAUSE_S = 0.5
_SQLITE_LOCK_S = 60
_CREATE_TABLES_LOCK = 0x65646765
"""Key of the PostgreSQL advisory lock that serializes the creation of tables."""
_URL_HINT = "Use sqlite:///FILE or postgresql://USER@HOST/DATABASE"

T = TypeVar("T")


class StudyDatabase:
    """Database of studies.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER@HOST/DATABASE`.
        on_message: receives one line when the database does not answer and the transaction is retried.

    Raises:
        ConfigError: the URL does not name a supported database.
        StoreError: the folder of the SQLite file cannot be created.
    """

    def __init__(self, url: str, on_message: Callable[[str], None]) -> None:
        self.url, self._on_message = url, on_message
        self._engine = _create_engine(url)
        self._has_answered = False

    def transact(self, transaction: Callable[[Connection], T], *, create: bool = False) -> T:
        """Run `transaction` and return its result; retry while the database does not answer.

        A retry runs `transaction` again, also if the first run was committed and only its answer was lost.

        Args:
            create: create the tables first, if they do not exist.

        Raises:
            StoreError: the database does not answer in time, or the error is permanent.
            IntegrityError: the transaction violates a constraint.
        """
        deadline = time.monotonic() + (RETRY_S if self._has_answered else FIRST_RETRY_S)
        last_reported = ""
        while True:
            try:
                with self._engine.begin() as connection:
                    if create:
                        _create_tables(connection)
                    answer = transaction(connection)
                self._has_answered = True
                return answer
            except IntegrityError:
                raise
            except SQLAlchemyError as error:
                if not _is_transient(error, self._engine) or time.monotonic() > deadline:
                    raise self._unusable(error) from error
                if last_reported != (last_reported := first_line(error)):
                    self._on_message(f"the study database does not answer ({last_reported}); retrying")
                time.sleep(_RETRY_PAUSE_S)

    def _unusable(self, error: SQLAlchemyError) -> StoreError:
        return StoreError(
            f"the study database cannot be used ({first_line(error)})",
            location=redact_password(self.url),
            hint="Start it, or set `store` (or EDGEOPT_STORE) to a database that answers; the same command continues",
        )


def file_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return f"sqlite:///{path}"


def _create_engine(url: str) -> sql.Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql":
            seconds = {"connect_timeout": 10}
            return sql.create_engine(
                parsed.set(drivername="postgresql+psycopg"), connect_args=seconds, pool_pre_ping=True
            )
        if parsed.get_backend_name() != "sqlite":
            raise ConfigError(
                f"`store` must be a SQLite or PostgreSQL URL, got {parsed.get_backend_name()}",
                location="store",
                hint=_URL_HINT,
            )
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError(
                "`store` must be a file or a server, got SQLite in memory, which is lost with the process",
                location="store",
                hint=_URL_HINT,
            )
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sql.create_engine(parsed, connect_args={"timeout": _SQLITE_LOCK_S})
    except ImportError as error:
        raise ConfigError(
            f"the database driver of `store` is not installed ({error})",
            location="store",
            hint="pip install 'edgeopt[postgres]'",
        ) from error
    except (SQLAlchemyError, ValueError) as error:  # ValueError: the port is not a number
        raise ConfigError("`store` is not a valid database URL", location="store", hint=_URL_HINT) from error
    except OSError as error:
        raise StoreError(
            f"the folder of studies cannot be created ({error.strerror})",
            location=url,
            hint="Set `state` to a writable folder",
        ) from error
    sql.event.listen(engine, "connect", _enable_write_ahead_log)
    return engine


def _create_tables(connection: Connection) -> None:
    """Create the tables if they do not exist. A lock serializes processes that do so at the same time."""
    if sql.inspect(connection).has_table(STUDIES.name):
        return
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_CREATE_TABLES_LOCK)))
    METADATA.create_all(connection)


def _enable_write_ahead_log(connection: Any, _: Any) -> None:
    """Let readers proceed during a write. SQLite ignores this on a file system without shared memory."""
    connection.execute("PRAGMA journal_mode=WAL")


def _is_transient(error: SQLAlchemyError, engine: sql.Engine) -> bool:
    """Return True if a retry may succeed."""
    if engine.dialect.name == "sqlite":
        return isinstance(error, OperationalError) and "locked" in str(error)
    return isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated)


def now_s(connection: Connection) -> float:
    """Return the time in Unix seconds by the clock of the database, which all workers share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sql.select(sql.extract("epoch", sql.func.clock_timestamp()))).scalar_one())
