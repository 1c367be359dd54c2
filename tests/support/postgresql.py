"""Start a private PostgreSQL server for tests and benchmarks, removed when the block ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """Return the folder with the programs of the newest installed server; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).parent


@contextmanager
def server(*, fsync: bool = True) -> Iterator[Postgres]:
    """Yield a running server; its files are in memory if `fsync` is off and memory suffices."""
    programs = binaries()
    assert programs is not None, "PostgreSQL is not installed: apt-get install postgresql"
    memory = Path("/dev/shm")
    roomy = not fsync and memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    folder = Path(tempfile.mkdtemp(prefix="edgeopt-postgresql-", dir=memory if roomy else None))
    try:
        made = Postgres(programs, folder, fsync=fsync)
        made.start()
        try:
            yield made
        finally:
            made.stop("immediate")
    finally:
        shutil.rmtree(folder)


class Postgres:
    """A private PostgreSQL server that can be stopped and started."""

    def __init__(self, programs: Path, folder: Path, *, fsync: bool) -> None:
        self._programs, self._folder = programs, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        if os.geteuid() == 0:  # the server refuses to be root
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "--username=edgeopt", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        settings_of_server = {
            "port": self.port,
            "listen_addresses": "'127.0.0.1'",
            "unix_socket_directories": "''",
            "fsync": "on" if fsync else "off",
            "max_connections": 60,
        }
        lines = [f"{key} = {value}\n" for key, value in settings_of_server.items()]
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(lines)

    def database(self) -> str:
        """Create an empty database and return its URL."""
        import psycopg

        name = f"d{uuid.uuid4().hex[:12]}"
        with psycopg.connect(f"{self._address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return f"{self._address}/{name}"

    def start(self) -> None:
        self._run("pg_ctl", "--wait", "--silent", f"--log={self._folder / 'log'}", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` disconnects clients cleanly, `immediate` simulates a crash."""
        self._run("pg_ctl", "--wait", "--silent", f"--mode={mode}", "stop")

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    @property
    def _address(self) -> str:
        return f"postgresql://edgeopt@127.0.0.1:{self.port}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._folder / "data"), *arguments]
        other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(  # type: ignore[call-overload]
            command, cwd=self._folder, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **other
        )
        if done.returncode:
            log = self._folder / "log"
            raise AssertionError(done.stderr.decode() + (log.read_text() if log.exists() else ""))
