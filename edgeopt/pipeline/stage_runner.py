"""Run the stages of one evaluation: take each from the cache or produce it, and record its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from edgeopt.cache import StageCache
from edgeopt.core.protocols import Lease, Progress

WAIT = "wait"
"""Name in `timings_s` of the time spent waiting for the device or for a stage of another process."""


class StageRunner:
    """Runner of the stages of one evaluation.

    It implements the `Cache` protocol for compression steps, so that the stages that they request are recorded too.

    Attributes:
        current_stage: name of the stage that runs now, or ran last.
        timings_s: seconds by stage name, without waiting; `WAIT` has the waiting time of all stages.
        saved_s: seconds that it originally took to produce the cached stages, by the name of the requesting stage. The
            name is `<stage>/<kind>` if the request came from the production of another stage.
        artifacts: paths of files and folders to record with the trial, by artifact name.
    """

    def __init__(self, cache: StageCache, progress: Progress, lease: Lease | None = None) -> None:
        """Create a runner. Without `lease`, stages do not wait for the device."""
        self.cache, self.progress, self.lease = cache, progress, lease
        self.current_stage = ""
        self.timings_s: dict[str, float] = {}
        self.saved_s: dict[str, float] = {}
        self.artifacts: dict[str, str] = {}
        self._counted: set[Path] = set()
        self._nesting = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the duration of the block as that of `stage`."""
        self.current_stage = stage
        self.progress(stage)
        start_s, waited_before_s = time.monotonic(), self.cache.waited_s
        try:
            yield
        finally:
            waited_s = self.cache.waited_s - waited_before_s
            self.timings_s[stage] = time.monotonic() - start_s - waited_s
            self.timings_s[WAIT] = self.timings_s.get(WAIT, 0.0) + waited_s

    def keep_artifact(self, name: str, path: Path) -> None:
        """Add a file or folder to the artifacts, if it exists."""
        if path.exists():
            self.artifacts[name] = str(path)

    def get_or_create(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        is_valid: Callable[[Path], bool] = lambda _: True,
    ) -> Path:
        """Return the folder of the stage for `inputs`; call `produce` if it is not cached.

        On a cache hit, count the original cost of the stage as saved, once per evaluation. The arguments are those of
        `StageCache.get_or_create_stage`.
        """
        name = f"{self.current_stage}/{kind}" if self._nesting else self.current_stage

        def produce_nested(directory: Path) -> None:
            self._nesting += 1
            try:
                produce(directory)
            finally:
                self._nesting -= 1

        stage = self.cache.get_or_create_stage(kind, inputs, produce_nested, is_valid)
        if stage.hit and stage.cost_s > 0 and stage.folder not in self._counted:
            self.saved_s[name] = self.saved_s.get(name, 0.0) + stage.cost_s
        self._counted.add(stage.folder)
        return stage.folder

    def resumable_folder(self, inputs: object) -> AbstractContextManager[Path]:
        """Return the cache's folder for the state of long work on `inputs`."""
        return self.cache.resumable_folder(inputs)

    def shared_device(self) -> AbstractContextManager[None]:
        """Hold the device together with other work while the block runs; count the wait separately."""
        return self._acquire(nullcontext() if self.lease is None else self.lease.shared(self.progress))

    def exclusive_device(self) -> AbstractContextManager[None]:
        """Hold the device exclusively while the block runs; count the wait separately."""
        return self._acquire(nullcontext() if self.lease is None else self.lease.exclusive(self.progress))

    @contextmanager
    def _acquire(self, lease: AbstractContextManager[None]) -> Iterator[None]:
        with ExitStack() as stack:
            with self.cache.waiting():
                stack.enter_context(lease)
            yield
