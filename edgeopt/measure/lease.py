"""The exclusive lease on this machine: no two measurements overlap, whoever started them.

The kernel releases the lock when its holder dies, so nothing has to be cleaned up after a crash.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt.errors import MeasureError
from edgeopt.ports import Progress

# not tempfile.gettempdir(): two processes with different TMPDIR still share the machine
FOLDER = Path("/tmp")  # noqa: S108  the folder made in it must belong to this user
_POLL_S = 0.2
_REPORT_S = 10.0


@contextmanager
def hold(progress: Progress, folder: Path = FOLDER) -> Iterator[None]:
    """Hold the device while the block runs; waits as long as another process of this user holds it.

    Raises MeasureError where the lock file cannot be used.
    """
    descriptor = _open(folder / f"edgeopt-{os.getuid()}" / "device.lock")
    try:
        _acquire(descriptor, progress)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{path.parent} belongs to another user")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MeasureError(
            f"the lease on the device cannot be taken ({error})", place=str(path), mend="Make this file writable"
        ) from error


def _acquire(descriptor: int, progress: Progress) -> None:
    waited_s = 0.0
    reported_s = -_REPORT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if waited_s - reported_s >= _REPORT_S:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
                progress(f"waiting for the device, which process {holder} measures ({waited_s:.0f} s)")
                reported_s = waited_s
            time.sleep(_POLL_S)
            waited_s += _POLL_S
