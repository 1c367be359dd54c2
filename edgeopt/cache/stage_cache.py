"""Run each stage once per input, code version and set of library versions.

A stage is written to a scratch folder and renamed when it is complete. A killed or failed stage therefore never looks
like a result. Concurrent processes wait for each other's stages.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from edgeopt.cache.entry_locks import (
    lock_shared,
    open_lock_file,
    read_cost,
    record_use,
    try_lock_exclusive,
    unwritable_cache_error,
    write_cost,
)
from edgeopt.cache.eviction import SCRATCH, evict, remove_entry
from edgeopt.core.config_objects import digest
from edgeopt.core.library_versions import versions
from edgeopt.core.protocols import Progress
from edgeopt.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage returned by the cache.

    Attributes:
        hit: True if the stage existed already or another process produced it meanwhile.
        cost_s: production time in seconds without waiting, in the process that produced the stage.
    """

    folder: Path
    hit: bool
    cost_s: float


class StageCache:
    """Stages under one folder, each in a folder named after its key.

    After producing a stage, the cache evicts the least recently used entries down to `limit_bytes` on disk; None
    disables eviction. Entries that a process uses are never evicted, even if the cache then exceeds its limit.

    Attributes:
        waited_s: seconds that this object has spent in `waiting`, which includes waiting for other processes.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        """Create the folder. Raises StoreError if it cannot be written."""
        self.root = root
        self.limit_bytes = limit_bytes
        self.waited_s = 0.0
        self._protected: dict[str, IO[str]] | None = None
        self._progress: Progress | None = None
        try:
            (root / SCRATCH).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable_cache_error(root, error) from error

    @contextmanager
    def protect(self, progress: Progress | None = None) -> Iterator[None]:
        """Protect every stage returned inside the block from eviction, until the outermost `protect` block ends.

        `progress` receives one message if the cache exceeds its limit because too much is in use.
        """
        self._progress = progress or self._progress
        if self._protected is not None:
            yield
            return
        self._protected = {}
        try:
            yield
        finally:
            for use in self._protected.values():
                use.close()
            self._protected, self._progress = None, None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting, which is not part of a stage's cost."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - start_s

    def get_or_create(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        is_valid: Callable[[Path], bool] = lambda _: True,
    ) -> Path:
        """Return the folder of the stage that `get_or_create_stage` returns."""
        return self.get_or_create_stage(kind, inputs, produce, is_valid).folder

    def get_or_create_stage(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        is_valid: Callable[[Path], bool] = lambda _: True,
    ) -> Stage:
        """Return the stage of `kind` for `inputs`. Call `produce` if it does not exist.

        Outside `protect`, the stage may be evicted as soon as it is returned.

        Args:
            kind: type of stage, such as `checkpoint` or `engine`.
            inputs: plain JSON data that determines the result, such as digests of inputs and parameters.
            produce: fills the empty folder that it receives. If it raises, no stage remains.
            is_valid: returns False for an existing stage that must be produced again. A stage that another process
                uses is returned even if it is invalid.

        Raises:
            StoreError: the stage cannot be written.
        """
        key = digest([kind, inputs, versions(), code_digest()])[:32]
        folder = self.root / kind / key
        with self.protect(), contextlib.ExitStack() as stack:
            assert self._protected is not None
            if key in self._protected:
                return Stage(folder=folder, hit=True, cost_s=read_cost(self.root, key))
            use = stack.enter_context(open_lock_file(self.root / "uses" / key))
            lock_shared(use)
            produced = False
            if not (folder.is_dir() and is_valid(folder)):
                fcntl.flock(use, fcntl.LOCK_UN)  # others may replace or evict the stage while this process waits
                with open_lock_file(self.root / "locks" / key) as producer_lock:
                    with self.waiting():
                        fcntl.flock(producer_lock, fcntl.LOCK_EX)
                    produced = self._produce(folder, use, produce, is_valid)
            record_use(use)
            stack.pop_all()
            self._protected[key] = use
            if produced:
                self._enforce_limit()
            return Stage(folder=folder, hit=not produced, cost_s=read_cost(self.root, key))

    @contextmanager
    def resumable_folder(self, inputs: object) -> Iterator[Path]:
        """Yield a folder for the state of a long task on `inputs`.

        The folder survives an error or a kill, so that the task can resume. It is removed when the block completes.
        """
        key = digest([inputs, versions(), code_digest()])[:32]
        folder = self.root / "drafts" / key
        with open_lock_file(self.root / "uses" / key) as use:
            lock_shared(use)
            record_use(use)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable_cache_error(self.root, error) from error
            yield folder
            shutil.rmtree(folder)

    def _produce(
        self, folder: Path, use: IO[str], produce: Callable[[Path], None], is_valid: Callable[[Path], bool]
    ) -> bool:
        """Fill `folder` and return True, or return False if another process has filled it.

        `use` is locked before `folder` exists, so that no other process evicts the new stage.
        """
        lock_shared(use)
        if folder.is_dir() and is_valid(folder):
            return False
        scratch = self.root / SCRATCH / folder.name
        try:
            if folder.is_dir():
                if try_lock_exclusive(use):
                    remove_entry(self.root, folder)
                lock_shared(use)
                if folder.is_dir():
                    return False
            shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
            scratch.mkdir(parents=True)
            start_s, waited_before_s = time.monotonic(), self.waited_s
            produce(scratch)
            write_cost(use, time.monotonic() - start_s - (self.waited_s - waited_before_s))
            folder.parent.mkdir(exist_ok=True)
            scratch.rename(folder)
        except OSError as error:
            raise StoreError(
                f"stage {folder.parent.name} cannot be written ({error})",
                location=str(self.root),
                hint="Free space with `edgeopt cache prune`, or set `state` to another folder",
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return True

    def _enforce_limit(self) -> None:
        if self.limit_bytes is None:
            return
        remaining_bytes = evict(self.root, self.limit_bytes).remaining_bytes
        if remaining_bytes > self.limit_bytes and self._progress is not None:
            self._progress(
                f"the cache exceeds its limit of {self.limit_bytes / 2**30:.3g} GiB: "
                f"entries in use keep it at {remaining_bytes / 2**30:.3g} GiB"
            )
            self._progress = None


STAGE_PACKAGES = ("core", "checkpoints", "machine", "compress", "runtimes", "measure", "pipeline")
"""Packages whose code determines the content of stages."""


@cache
def code_digest() -> str:
    """Return the SHA-256 of the sources in `STAGE_PACKAGES`, so that changed code never reuses an old stage."""
    package = Path(__file__).parents[1]
    combined = hashlib.sha256()
    for path in sorted(path for name in STAGE_PACKAGES for path in (package / name).rglob("*.py")):
        combined.update(path.read_bytes())
    return combined.hexdigest()
