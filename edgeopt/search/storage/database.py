"""A store of studies: a SQLite file or a PostgreSQL database, short transactions, and patience with its silence."""

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

PATIENCE_S = 120.0
"""How long a store may be silent, as one that is restarted is, before a sweep gives up."""
STRANGER_S = 15.0
"""The same of a store that has not answered before: it may be the wrong address."""
_PAUSE_S = 0.5
_LOCK_S = 60
_MAKING = 0x65646765
"""Key of the lock of those who make the tables in PostgreSQL."""

T = TypeVar("T")


class StudyStore:
    """The store at `url`: `sqlite:///FILE`, or `postgresql://USER@HOST/DATABASE`.

    `tell` hears when it is silent and is waited for. Raises ConfigError for what is no address of a store.
    """

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self.url, self.tell = url, tell
        self._engine = _engine(url)
        self._answered = False

    def transact(self, work: Callable[[Connection], T], *, create: bool = False) -> T:
        """Do `work`, and wait for a store that is silent for a while. Raises StoreError where it stays so."""
        end, told = time.monotonic() + (PATIENCE_S if self._answered else STRANGER_S), ""
        while True:
            try:
                with self._engine.begin() as connection:
                    if create:
                        _make_tables(connection)
                    done = work(connection)
                self._answered = True
                return done
            except IntegrityError:
                raise
            except SQLAlchemyError as error:
                if not _passing(error, self._engine) or time.monotonic() > end:
                    raise self._unusable(error) from error
                if told != (told := first_line(error)):
                    self.tell(f"the study's store does not answer ({told}); waiting for it")
                time.sleep(_PAUSE_S)

    def _unusable(self, error: SQLAlchemyError) -> StoreError:
        return StoreError(
            f"the study's store cannot be used ({first_line(error)})",
            location=redact_password(self.url),
            hint="Start it or set `store` (or EDGEOPT_STORE) to one that answers; the same command goes on",
        )


def file_url(path: Path) -> str:
    return f"sqlite:///{path}"


def _engine(url: str) -> sql.Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql":
            seconds = {"connect_timeout": 10}
            return sql.create_engine(
                parsed.set(drivername="postgresql+psycopg"), connect_args=seconds, pool_pre_ping=True
            )
        if parsed.get_backend_name() != "sqlite":
            raise ConfigError(
                f"studies are not kept in {parsed.get_backend_name()}",
                location="store",
                hint="Give sqlite:///FILE or postgresql://USER@HOST/DATABASE",
            )
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError(
                "a study in memory has one worker and ends with it",
                location="store",
                hint="Give sqlite:///FILE or postgresql://USER@HOST/DATABASE",
            )
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sql.create_engine(parsed, connect_args={"timeout": _LOCK_S})
    except ImportError as error:
        raise ConfigError(
            f"the driver of this store is not installed ({error})",
            location="store",
            hint="pip install 'edgeopt[postgres]'",
        ) from error
    except (SQLAlchemyError, ValueError) as error:  # of a port that is no number
        raise ConfigError(
            "it is no address of a store",
            location="store",
            hint="Give sqlite:///FILE or postgresql://USER@HOST/DATABASE",
        ) from error
    except OSError as error:
        raise StoreError(
            f"the folder of studies cannot be made ({error.strerror})",
            location=url,
            hint="Set state to a writable folder",
        ) from error
    sql.event.listen(engine, "connect", _write_ahead)
    return engine


def _make_tables(connection: Connection) -> None:
    """The tables, unless they are there. One process makes them, and those that want to meanwhile wait for it."""
    if sql.inspect(connection).has_table(STUDIES.name):
        return
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_MAKING)))
    METADATA.create_all(connection)


def _write_ahead(connection: Any, _: Any) -> None:
    """Readers do not wait for a writer then; a file system without shared memory keeps its own way."""
    connection.execute("PRAGMA journal_mode=WAL")


def _passing(error: SQLAlchemyError, engine: sql.Engine) -> bool:
    """Whether the store may answer again by itself."""
    if engine.dialect.name == "sqlite":
        return isinstance(error, OperationalError) and "locked" in str(error)
    return isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated)


def now_s(connection: Connection) -> float:
    """Seconds since 1970 by the store's clock, which is one for all workers."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sql.select(sql.extract("epoch", sql.func.clock_timestamp()))).scalar_one())
