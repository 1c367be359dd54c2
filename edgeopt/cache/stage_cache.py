"""Stages, each done once for equal inputs.

A stage is written into a scratch folder and renamed when it is complete, so that a killed or failed
stage leaves nothing that looks like an answer. Concurrent processes wait for one another's stage.
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

from edgeopt.cache.entry_locks import alone, lock_file, note, read_cost, share, unwritable, write_cost
from edgeopt.cache.eviction import evict, remove
from edgeopt.core.config_objects import digest
from edgeopt.core.library_versions import versions
from edgeopt.core.protocols import Progress
from edgeopt.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage as it was asked for.

    Attributes:
        found: whether it was there, or another process made it meanwhile; else it was made now.
        cost_s: seconds of work that it took to make, whoever made it; waiting is no work.
    """

    folder: Path
    found: bool
    cost_s: float


class StageCache:
    """Stages under one folder, each in a folder named after its key.

    After each stage that is made, the least recently used entries go until `limit_bytes` are left on disk;
    None sets no limit. What a process holds is never evicted, even where the limit cannot be kept then.

    Attributes:
        waited_s: seconds that this store's user has spent in `waiting`, or for stages that another process made.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.waited_s = 0.0
        self._held: dict[str, IO[str]] | None = None
        self._tell: Progress | None = None
        try:
            (root / "scratch").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(root, error) from error

    @contextmanager
    def protect(self, tell: Progress | None = None) -> Iterator[None]:
        """Keep every stage that this store returns inside the block until the outermost such block ends.

        `tell` hears once of a limit that cannot be kept, because too much is in use.
        """
        self._tell = tell or self._tell
        if self._held is not None:
            yield
            return
        self._held = {}
        try:
            yield
        finally:
            for use in self._held.values():
                use.close()
            self._held, self._tell = None, None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What passes inside the block is counted as waiting, and is no part of what a stage costs."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - started

    def get_or_create(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        valid: Callable[[Path], bool] = lambda _: True,
    ) -> Path:
        """The folder of `find`."""
        return self.get_or_create_stage(kind, inputs, produce, valid).folder

    def get_or_create_stage(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        valid: Callable[[Path], bool] = lambda _: True,
    ) -> Stage:
        """The stage that `produce` fills, made once for equal `inputs`, code and library versions.

        Outside `holding` it may be evicted as soon as it is returned.

        Args:
            inputs: plain JSON data that determines the outcome (digests of what goes in, parameters).
            produce: fills the empty folder that it is given; what it raises leaves no stage behind.
            valid: whether a stage found may be taken; one that may not is made anew, unless somebody uses it.
        """
        key = digest([kind, inputs, versions(), code_digest()])[:32]
        final = self.root / kind / key
        with self.protect(), contextlib.ExitStack() as opened:
            assert self._held is not None
            if key in self._held:
                return Stage(folder=final, found=True, cost_s=read_cost(self.root, key))
            use = opened.enter_context(lock_file(self.root / "uses" / key))
            share(use)
            made = False
            if not (final.is_dir() and valid(final)):
                fcntl.flock(use, fcntl.LOCK_UN)  # while this waits, others may replace or evict it
                with lock_file(self.root / "locks" / key) as making:
                    with self.waiting():
                        fcntl.flock(making, fcntl.LOCK_EX)
                    made = self._make(final, use, produce, valid)
            note(use)
            opened.pop_all()
            self._held[key] = use
            if made:
                self._keep_limit()
            return Stage(folder=final, found=not made, cost_s=read_cost(self.root, key))

    @contextmanager
    def resumable_folder(self, inputs: object) -> Iterator[Path]:
        """A folder for unfinished work on `inputs`: kept when the work fails or is killed, removed when it is done."""
        key = digest([inputs, versions(), code_digest()])[:32]
        folder = self.root / "drafts" / key
        with lock_file(self.root / "uses" / key) as use:
            share(use)
            note(use)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self.root, error) from error
            yield folder
            shutil.rmtree(folder)

    def _make(self, final: Path, use: IO[str], produce: Callable[[Path], None], valid: Callable[[Path], bool]) -> bool:
        """Fill `final` unless another process has done so; `use` is shared from before it is there until after."""
        share(use)
        if final.is_dir() and valid(final):
            return False
        scratch = self.root / "scratch" / final.name
        try:
            if final.is_dir():
                if alone(use):
                    remove(self.root, final)
                share(use)
                if final.is_dir():
                    return False
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir(parents=True)
            started, waited_s = time.monotonic(), self.waited_s
            produce(scratch)
            write_cost(use, time.monotonic() - started - (self.waited_s - waited_s))
            final.parent.mkdir(exist_ok=True)
            scratch.rename(final)
        except OSError as error:
            raise StoreError(
                f"stage {final.parent.name} cannot be written ({error})",
                location=str(self.root),
                hint="Free space (edgeopt cache prune), or set state to another folder",
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return True

    def _keep_limit(self) -> None:
        if self.limit_bytes is None:
            return
        left = evict(self.root, self.limit_bytes).remaining_bytes
        if left > self.limit_bytes and self._tell is not None:
            self._tell(
                f"the cache holds {left / 2**30:.3g} GiB, above its limit of {self.limit_bytes / 2**30:.3g} GiB: "
                "what is in use is not evicted"
            )
            self._tell = None


STAGE_PACKAGES = ("core", "checkpoints", "machine", "compress", "runtimes", "measure", "pipeline")
"""Packages whose code decides what a stage contains."""


@cache
def code_digest() -> str:
    """Return the sha256 of the sources in `STAGE_PACKAGES`, so that changed code never reuses an old stage."""
    package = Path(__file__).parents[1]
    combined = hashlib.sha256()
    for path in sorted(path for name in STAGE_PACKAGES for path in (package / name).rglob("*.py")):
        combined.update(path.read_bytes())
    return combined.hexdigest()
