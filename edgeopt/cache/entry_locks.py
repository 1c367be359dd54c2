"""Locks on entries: whoever uses one keeps it, and who removes one must be alone with it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from edgeopt.errors import StoreError


def lock_file(path: Path) -> IO[str]:
    """The file `path` to lock, which closing unlocks. Raises StoreError where it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise unwritable(path.parents[1], error) from error


def share(use: IO[str]) -> None:
    """Use an entry from now on, beside others; waits while one who removes it is alone with it."""
    fcntl.flock(use, fcntl.LOCK_SH)


def alone(use: IO[str]) -> bool:
    """Whether nobody else uses the entry; then nobody can until `use` is shared or closed. Never waits.

    Where it is false, `use` is not locked any more, even if it was shared before.
    """
    try:
        fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(use, fcntl.LOCK_UN)
        return False
    return True


def note(use: IO[str]) -> None:
    """The entry was used last now; the time that a file system itself notes may be off or coarse."""
    now = time.time_ns()
    os.utime(use.fileno(), ns=(now, now))


def write_cost(use: IO[str], seconds: float) -> None:
    """Remember in the mark how long the entry took to make: beside the entry, whose content is what it is."""
    use.truncate(0)
    use.write(f"{seconds:.6g}\n")
    use.flush()


def read_cost(root: Path, key: str) -> float:
    """Seconds that an entry took to make; 0 where they were not remembered, or a crash of the machine spoiled them."""
    try:
        return float((root / "uses" / key).read_text())
    except ValueError:
        return 0.0


@contextmanager
def protect_paths(paths: Iterable[Path]) -> Iterator[bool]:
    """Keep the entries that hold `paths` while the block runs; whether all paths are there.

    Paths outside a cache are left alone. Nothing is written, so that a read-only cache can be used.
    """
    with ExitStack() as held:
        found = [path.resolve() for path in paths]
        marks = {mark for path in found for mark in _marks(path) if mark.is_file()}
        for mark in sorted(marks):
            share(held.enter_context(mark.open()))
        yield all(path.exists() for path in found)


def _marks(path: Path) -> Iterator[Path]:
    """Where the file of uses would lie, were `path` or a folder above it an entry."""
    for folder in (path, *path.parents):
        yield folder.parent.parent / "uses" / folder.name


def unwritable(root: Path, error: OSError) -> StoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(
        f"the cache folder cannot be written ({error.strerror})",
        location=str(root),
        hint="Free space: edgeopt cache prune" if full else "Set state to a writable folder",
    )
