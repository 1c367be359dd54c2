"""The lease on a device that several hosts or containers reach: advisory locks of PostgreSQL, and inside them files.

There are two locks, as in edgeopt.machine.device_lease: the turn and the device. PostgreSQL releases both when the
connection that holds them ends. A dead holder therefore blocks nobody, and a restart of the server frees all locks.
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

PATIENCE_S = 120.0
"""How long the database may be silent, as one that is restarted is."""
_TURN, _DEVICE = "turn", "device"
_PAUSE_S = 0.2


class _Own(threading.local):
    """What this thread has of the device, so that it never waits for itself."""

    alone = False
    shared: Connection | None = None
    """The connection that holds the lock of `work`."""


_own = _Own()


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresLease:
    """The lease on `device`, a name that all who reach it agree on, by the database `url`."""

    url: str
    device: str

    @contextmanager
    def exclusive(self, progress: Progress) -> Iterator[None]:
        """Have the device alone inside the block. Raises MeasureError where the database does not answer."""
        if _own.alone:
            yield
            return
        with self._lent(progress), self._locked(progress, alone=True), device_lease.exclusive(progress):
            _own.alone = True
            try:
                yield
            finally:
                _own.alone = False

    @contextmanager
    def shared(self, progress: Progress) -> Iterator[None]:
        """Nobody measures inside the block. Raises MeasureError where the database does not answer."""
        if _own.alone or _own.shared is not None:
            yield
            return
        with self._locked(progress, alone=False) as connection, device_lease.shared(progress):
            _own.shared = connection
            try:
                yield
            finally:
                _own.shared = None

    @contextmanager
    def _lent(self, progress: Progress) -> Iterator[None]:
        """Inside `work` of the same thread, its lock is given back while the block measures."""
        lent = _own.shared
        if lent is not None:
            self._let_go(lent, _DEVICE)
        try:
            yield
        finally:
            if lent is not None:
                self._take(lent, _DEVICE, progress, alone=False)

    @contextmanager
    def _locked(self, progress: Progress, *, alone: bool) -> Iterator[Connection]:
        """The connection that has the device; closing it lets go. The turn is kept by those alone."""
        connection = self._connected(progress, alone=alone)
        try:
            yield connection
        finally:
            connection.close()

    def _connected(self, progress: Progress, *, alone: bool) -> Connection:
        from sqlalchemy.exc import OperationalError

        engine, end = self._engine(), time.monotonic() + PATIENCE_S
        while True:
            try:
                connection = engine.connect()
                self._take(connection, _TURN, progress, alone=alone)
                self._take(connection, _DEVICE, progress, alone=alone)
                if not alone:
                    self._let_go(connection, _TURN)
                return connection
            except OperationalError as error:
                if time.monotonic() > end:
                    raise MeasureError(
                        "the database that keeps the device's lease does not answer",
                        location=engine.url.render_as_string(hide_password=True),
                        hint="Start it again; the same command goes on",
                    ) from error
                progress("the database that keeps the device's lease does not answer; waiting for it")
                time.sleep(_PAUSE_S)

    def _engine(self) -> Engine:
        import sqlalchemy as sql

        return sql.create_engine(
            sql.make_url(self.url).set(drivername="postgresql+psycopg"),
            poolclass=sql.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 10},
        )

    def _take(self, connection: Connection, name: str, progress: Progress, *, alone: bool) -> None:
        from sqlalchemy import text

        asked = text(f"select pg_try_advisory_lock{'' if alone else '_shared'}(:key)")

        def taken() -> bool:
            return bool(connection.execute(asked, {"key": self._key(name)}).scalar())

        device_lease.wait_until(taken, progress, lambda: "which another worker has")

    def _let_go(self, connection: Connection, name: str) -> None:
        from sqlalchemy import text

        connection.execute(text("select pg_advisory_unlock_shared(:key)"), {"key": self._key(name)})

    def _key(self, name: str) -> int:
        """A number of 60 bits, as advisory locks are named by."""
        return int(digest(["edgeopt", self.device, name])[:15], 16)
