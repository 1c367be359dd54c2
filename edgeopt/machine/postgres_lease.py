"""Lease a device that several hosts or containers share, with PostgreSQL advisory locks and the local file lease.

The lease uses the two locks of edgeopt.machine.device_lease, turn and device. PostgreSQL releases both when the
connection that holds them ends. A holder that dies therefore blocks nobody, and a server restart releases all locks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.core.config_objects import digest
from edgeopt.core.protocols import Progress
from edgeopt.errors import MeasureError
from edgeopt.machine import device_lease

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

CONNECT_TIMEOUT_S = 120.0
"""Time to wait for a database that does not answer, for example during a restart."""
_TURN, _DEVICE = "turn", "device"
_RETRY_S = 0.2


class _ThreadState(threading.local):
    """Locks that this thread holds, so that a nested lease never waits for its own thread.

    Attributes:
        exclusive: this thread is inside `exclusive`.
        shared: connection that holds the shared lock of this thread.
    """

    exclusive = False
    shared: Connection | None = None


_thread = _ThreadState()


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresLease:
    """Lease on a device that several hosts or containers share.

    Attributes:
        url: address of the PostgreSQL database.
        device: name of the device; all hosts that share it use the same name.
    """

    url: str
    device: str

    @contextmanager
    def exclusive(self, progress: Progress) -> Iterator[None]:
        """Hold the device exclusively while the block runs; nested leases behave as in `device_lease`.

        Raises MeasureError if the database does not answer.
        """
        if _thread.exclusive:
            yield
            return
        with (
            self._release_shared(progress),
            self._connect_locked(progress, exclusive=True),
            device_lease.exclusive(progress),
        ):
            _thread.exclusive = True
            try:
                yield
            finally:
                _thread.exclusive = False

    @contextmanager
    def shared(self, progress: Progress) -> Iterator[None]:
        """Prevent measurements while the block runs; nested leases behave as in `device_lease`.

        Raises MeasureError if the database does not answer.
        """
        if _thread.exclusive or _thread.shared is not None:
            yield
            return
        with self._connect_locked(progress, exclusive=False) as connection, device_lease.shared(progress):
            _thread.shared = connection
            try:
                yield
            finally:
                _thread.shared = None

    @contextmanager
    def _release_shared(self, progress: Progress) -> Iterator[None]:
        """Release the shared lock of this thread, if any, while the block runs."""
        connection = _thread.shared
        if connection is not None:
            self._unlock_shared(connection, _DEVICE)
        try:
            yield
        finally:
            if connection is not None:
                self._lock(connection, _DEVICE, progress, exclusive=False)

    @contextmanager
    def _connect_locked(self, progress: Progress, *, exclusive: bool) -> Iterator[Connection]:
        """Yield a connection that holds the device lock, and the turn if `exclusive`. Close it to release them."""
        connection = self._connect(progress, exclusive=exclusive)
        try:
            yield connection
        finally:
            connection.close()

    def _connect(self, progress: Progress, *, exclusive: bool) -> Connection:
        """Connect and take the locks; retry while the database does not answer."""
        from sqlalchemy.exc import OperationalError

        engine, end_s = self._create_engine(), time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            try:
                connection = engine.connect()
                self._lock(connection, _TURN, progress, exclusive=exclusive)
                self._lock(connection, _DEVICE, progress, exclusive=exclusive)
                if not exclusive:
                    self._unlock_shared(connection, _TURN)
                return connection
            except OperationalError as error:
                if time.monotonic() > end_s:
                    raise MeasureError(
                        "the database of the device lease does not answer",
                        location=engine.url.render_as_string(hide_password=True),
                        hint="Start the database and run the same command again: it continues",
                    ) from error
                progress("waiting for the database of the device lease, which does not answer")
                time.sleep(_RETRY_S)

    def _create_engine(self) -> Engine:
        import sqlalchemy as sql

        return sql.create_engine(
            sql.make_url(self.url).set(drivername="postgresql+psycopg"),
            poolclass=sql.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 10},
        )

    def _lock(self, connection: Connection, name: str, progress: Progress, *, exclusive: bool) -> None:
        from sqlalchemy import text

        statement = text(f"select pg_try_advisory_lock{'' if exclusive else '_shared'}(:key)")

        def try_lock() -> bool:
            return bool(connection.execute(statement, {"key": self._key(name)}).scalar())

        device_lease.wait_for_lock(try_lock, progress, lambda: "another worker is using it")

    def _unlock_shared(self, connection: Connection, name: str) -> None:
        from sqlalchemy import text

        connection.execute(text("select pg_advisory_unlock_shared(:key)"), {"key": self._key(name)})

    def _key(self, name: str) -> int:
        """Return the key of an advisory lock: 60 bits, which fit the signed 64-bit keys of PostgreSQL."""
        return int(digest(["edgeopt", self.device, name])[:15], 16)
