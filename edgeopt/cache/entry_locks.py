"""Lock cache entries: shared by the processes that use an entry, exclusive for the process that removes it."""

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


def open_lock_file(path: Path) -> IO[str]:
    """Open or create a lock file; closing it releases its lock. Raises StoreError if it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise unwritable_cache_error(path.parents[1], error) from error


def lock_shared(use: IO[str]) -> None:
    """Lock an entry for use; wait while another process removes it."""
    fcntl.flock(use, fcntl.LOCK_SH)


def try_lock_exclusive(use: IO[str]) -> bool:
    """Lock the entry exclusively and return True if no other process uses it. Never wait.

    If another process uses it, release the lock of `use` and return False.
    """
    try:
        fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(use, fcntl.LOCK_UN)
        return False
    return True


def record_use(use: IO[str]) -> None:
    """Set the time of the last use to now. Timestamps that the file system sets may be coarse or skewed."""
    now_ns = time.time_ns()
    os.utime(use.fileno(), ns=(now_ns, now_ns))


def write_cost(use: IO[str], cost_s: float) -> None:
    """Write the production time to the lock file, because the entry itself must depend only on its inputs."""
    use.truncate(0)
    use.write(f"{cost_s:.6g}\n")
    use.flush()


def read_cost(root: Path, key: str) -> float:
    """Return the production time of an entry in seconds; 0 if it was not recorded or a crash corrupted it."""
    try:
        return float((root / "uses" / key).read_text())
    except ValueError:
        return 0.0


@contextmanager
def protect_paths(paths: Iterable[Path]) -> Iterator[bool]:
    """Protect the cache entries that contain `paths` from eviction while the block runs; yield True if all exist.

    Paths outside a cache are not locked. Nothing is written, so a read-only cache works too.
    """
    with ExitStack() as stack:
        resolved = [path.resolve() for path in paths]
        lock_files = {file for path in resolved for file in _candidate_lock_files(path) if file.is_file()}
        for file in sorted(lock_files):
            lock_shared(stack.enter_context(file.open()))
        yield all(path.exists() for path in resolved)


def _candidate_lock_files(path: Path) -> Iterator[Path]:
    """Yield the path of the lock file that `path` or a parent has if that folder is a cache entry."""
    for folder in (path, *path.parents):
        yield folder.parent.parent / "uses" / folder.name


def unwritable_cache_error(root: Path, error: OSError) -> StoreError:
    """Return the error for a cache folder that cannot be written, with a hint that depends on the cause."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(
        f"the cache folder cannot be written ({error.strerror})",
        location=str(root),
        hint="Free space with `edgeopt cache prune`" if full else "Set `state` to a writable folder",
    )
