"""Lease this machine, so that a measurement overlaps neither another measurement nor work that uses all cores.

A measurement takes the device exclusively (`exclusive`). Training, quantization and builds share it with each other
(`shared`). Each locks two files: first `device.turn`, then `device.lock`. A measurement holds the turn while it waits
for the device and while it measures. Shared work that arrives later waits for the turn, so measurements never starve.
Shared work releases the turn as soon as it has the device, so any number of such processes run concurrently.

The kernel releases the locks of a process that dies, so a crash needs no cleanup. Hosts that share one device need a
lock beyond files: see edgeopt.machine.postgres_lease.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt.core.protocols import Progress
from edgeopt.errors import MeasureError

# not tempfile.gettempdir(): two processes with different TMPDIR still share the machine
FOLDER = Path("/tmp")  # noqa: S108  the folder created in it must belong to this user
_TURN, _DEVICE = "device.turn", "device.lock"
_POLL_S = 0.2
_REPORT_S = 10.0


class _ThreadState(threading.local):
    """Locks that this thread holds, so that a nested lease never waits for its own thread.

    Attributes:
        exclusive: this thread is inside `exclusive`.
        shared: descriptor of the `device.lock` that `shared` has locked in this thread.
    """

    exclusive = False
    shared: int | None = None


_thread = _ThreadState()


@contextmanager
def exclusive(progress: Progress, folder: Path = FOLDER) -> Iterator[None]:
    """Hold the device exclusively while the block runs; wait for this user's other measurements and shared work.

    Inside `shared` of the same thread, release the shared lock during the block, so that waiting measurements run
    first, and take it again afterwards. Inside another `exclusive` of the same thread, do nothing.

    Raises MeasureError if a lock file cannot be used.
    """
    if _thread.exclusive:
        yield
        return
    released = _thread.shared
    if released is not None:
        fcntl.flock(released, fcntl.LOCK_UN)
    try:
        with _lock(folder, _TURN, fcntl.LOCK_EX, progress) as turn:
            os.ftruncate(turn, 0)
            os.pwrite(turn, str(os.getpid()).encode(), 0)
            with _lock(folder, _DEVICE, fcntl.LOCK_EX, progress):
                _thread.exclusive = True
                try:
                    yield
                finally:
                    _thread.exclusive = False
    finally:
        if released is not None:
            with _lock(folder, _TURN, fcntl.LOCK_SH, progress):
                _acquire(released, fcntl.LOCK_SH, progress, _describe_shared_work)


@contextmanager
def shared(progress: Progress, folder: Path = FOLDER) -> Iterator[None]:
    """Prevent measurements while the block runs; wait for running and waiting ones first.

    Other `shared` blocks run concurrently. Inside `shared` or `exclusive` of the same thread, do nothing.

    Raises MeasureError if a lock file cannot be used.
    """
    if _thread.exclusive or _thread.shared is not None:
        yield
        return
    with (
        _lock(folder, _TURN, fcntl.LOCK_SH, progress) as turn,
        _lock(folder, _DEVICE, fcntl.LOCK_SH, progress) as device,
    ):
        fcntl.flock(turn, fcntl.LOCK_UN)
        _thread.shared = device
        try:
            yield
        finally:
            _thread.shared = None


@contextmanager
def _lock(folder: Path, name: str, mode: int, progress: Progress) -> Iterator[int]:
    """Lock a file during the block and yield its descriptor; closing the descriptor unlocks the file."""
    descriptor = _open(folder / f"edgeopt-{os.getuid()}" / name)
    try:
        _acquire(descriptor, mode, progress, _describe_measurement if name == _TURN else _describe_shared_work)
        yield descriptor
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
            f"cannot open the lock file of the device lease ({error})",
            location=str(path),
            hint="Make the file and its folder writable",
        ) from error


def _describe_measurement(descriptor: int) -> str:
    holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
    return f"process {holder} is measuring"


def _describe_shared_work(_: int) -> str:
    return "other processes are compressing or building"


def _acquire(descriptor: int, mode: int, progress: Progress, describe_holder: Callable[[int], str]) -> None:
    def try_lock() -> bool:
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    wait_for_lock(try_lock, progress, lambda: describe_holder(descriptor))


def wait_for_lock(try_lock: Callable[[], bool], progress: Progress, describe_holder: Callable[[], str]) -> None:
    """Call `try_lock` until it returns True; report the current holder every ten seconds."""
    waited_s = 0.0
    reported_s = -_REPORT_S
    while not try_lock():
        if waited_s - reported_s >= _REPORT_S:
            progress(f"waiting for the device: {describe_holder()} ({waited_s:.0f} s)")
            reported_s = waited_s
        time.sleep(_POLL_S)
        waited_s += _POLL_S
