"""Content-addressed stage cache: the same step on the same input is done once.

A stage is written into a scratch folder and renamed when it is complete, so that a killed or failed
stage leaves nothing that looks like an answer. Concurrent processes wait for one another's stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from edgeopt.errors import StoreError
from edgeopt.part import digest

LIBRARIES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-genai")


class Store:
    """Stages under one folder, each in a folder named after its key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            (root / "scratch").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the cache folder cannot be written ({error.strerror})",
                place=str(root),
                mend="Set state to a writable folder",
            ) from error

    def stage(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        valid: Callable[[Path], bool] = lambda _: True,
    ) -> Path:
        """The folder that `produce` fills, made once for equal `inputs`, code and library versions.

        Args:
            inputs: plain JSON data that determines the outcome (digests of what goes in, parameters).
            produce: fills the empty folder that it is given; what it raises leaves no stage behind.
            valid: whether a stage found may be taken; one that may not is made anew.
        """
        key = digest([kind, inputs, versions(), code_digest()])
        final = self.root / kind / key[:32]
        if final.is_dir() and valid(final):
            return final
        with self._lock(key):
            if final.is_dir() and valid(final):
                return final
            scratch = self.root / "scratch" / key[:32]
            try:
                shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
                scratch.mkdir(parents=True)
                produce(scratch)
                final.parent.mkdir(exist_ok=True)
                shutil.rmtree(final, ignore_errors=True)
                scratch.rename(final)
            except OSError as error:
                raise StoreError(
                    f"stage {kind} cannot be written ({error})",
                    place=str(self.root),
                    mend="Free space, or set state to another folder",
                ) from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return final

    @contextlib.contextmanager
    def draft(self, inputs: object) -> Iterator[Path]:
        """A folder for unfinished work on `inputs`: kept when the work fails or is killed, removed when it is done."""
        folder = self.root / "drafts" / digest([inputs, versions(), code_digest()])[:32]
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        locks = self.root / "locks"
        try:
            locks.mkdir(exist_ok=True)
            handle = (locks / key[:32]).open("w")
        except OSError as error:
            raise StoreError(
                f"the cache folder cannot be written ({error.strerror})",
                place=str(self.root),
                mend="Set state to a writable folder",
            ) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a stage produces."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def code_digest() -> str:
    """sha256 over the sources that compress, build and measure: new code never takes an old stage for its own."""
    package = Path(__file__).parent
    combined = hashlib.sha256()
    shared = (path for path in package.glob("*.py") if path.name not in ("cli.py", "config.py"))
    rooms = (path for room in ("compress", "runtimes", "measure") for path in (package / room).rglob("*.py"))
    for path in sorted((*shared, *rooms)):
        combined.update(path.read_bytes())
    return combined.hexdigest()
