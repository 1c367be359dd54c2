"""The lease on this machine: no two measurements overlap, and none overlaps with what works on all cores.

A measurement holds the device alone (`hold`). What trains, rounds and builds holds it together with others of its
kind (`work`). Two files are locked: `device.turn` by who is next, and `device.lock` by who has the device. A
measurement keeps the turn while it waits and while it measures, so that work that comes later waits behind it;
work takes the turn for a moment only, so that any number of it goes on at once and no measurement is starved.

The kernel releases locks when their holder dies, so nothing has to be cleaned up after a crash. Several hosts that
share one device would lock more than files: `_locked` is the only place that knows what is locked.
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
FOLDER = Path("/tmp")  # noqa: S108  the folder made in it must belong to this user
_TURN, _DEVICE = "device.turn", "device.lock"
_POLL_S = 0.2
_REPORT_S = 10.0


class _Own(threading.local):
    """What this thread has of the device, so that it never waits for itself."""

    alone = False
    shared: int | None = None
    """The descriptor of `device.lock`, which `work` locked."""


_own = _Own()


@contextmanager
def exclusive(progress: Progress, folder: Path = FOLDER) -> Iterator[None]:
    """Have the device alone while the block runs; waits for measurements and work of this user's other processes.

    Inside `work` of the same thread that work lets others measure first and goes on after the block; inside
    another `hold` this one adds nothing. Raises MeasureError where a lock file cannot be used.
    """
    if _own.alone:
        yield
        return
    lent = _own.shared
    if lent is not None:
        fcntl.flock(lent, fcntl.LOCK_UN)
    try:
        with (
            _locked(folder, _TURN, fcntl.LOCK_EX, progress) as turn,
            _locked(folder, _DEVICE, fcntl.LOCK_EX, progress),
        ):
            os.ftruncate(turn, 0)
            os.pwrite(turn, str(os.getpid()).encode(), 0)
            _own.alone = True
            try:
                yield
            finally:
                _own.alone = False
    finally:
        if lent is not None:
            with _locked(folder, _TURN, fcntl.LOCK_SH, progress):
                _acquire(lent, fcntl.LOCK_SH, progress, _worked_on)


@contextmanager
def shared(progress: Progress, folder: Path = FOLDER) -> Iterator[None]:
    """Keep the device from being measured while the block runs, beside others who work; waits while it is measured.

    Inside `work` or `hold` of the same thread this one adds nothing. Raises MeasureError where a lock file cannot be
    used.
    """
    if _own.alone or _own.shared is not None:
        yield
        return
    with (
        _locked(folder, _TURN, fcntl.LOCK_SH, progress) as turn,
        _locked(folder, _DEVICE, fcntl.LOCK_SH, progress) as device,
    ):
        fcntl.flock(turn, fcntl.LOCK_UN)
        _own.shared = device
        try:
            yield
        finally:
            _own.shared = None


@contextmanager
def _locked(folder: Path, name: str, how: int, progress: Progress) -> Iterator[int]:
    """The descriptor of the locked file; closing it at the end of the block unlocks it."""
    descriptor = _open(folder / f"edgeopt-{os.getuid()}" / name)
    try:
        _acquire(descriptor, how, progress, _measured if name == _TURN else _worked_on)
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
            f"the lease on the device cannot be taken ({error})", location=str(path), hint="Make this file writable"
        ) from error


def _measured(descriptor: int) -> str:
    holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
    return f"which process {holder} measures"


def _worked_on(_: int) -> str:
    return "on which others compress or build"


def _acquire(descriptor: int, how: int, progress: Progress, why: Callable[[int], str]) -> None:
    def taken() -> bool:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    wait_until(taken, progress, lambda: why(descriptor))


def wait_until(taken: Callable[[], bool], progress: Progress, why: Callable[[], str]) -> None:
    """Try until the device is `taken`, and tell every ten seconds what is waited for."""
    waited_s = 0.0
    reported_s = -_REPORT_S
    while not taken():
        if waited_s - reported_s >= _REPORT_S:
            progress(f"waiting for the device, {why()} ({waited_s:.0f} s)")
            reported_s = waited_s
        time.sleep(_POLL_S)
        waited_s += _POLL_S
