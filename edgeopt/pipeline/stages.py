"""The stages of one evaluation, each taken from the store or made: their time, their saving, and what is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from edgeopt.cache import StageCache
from edgeopt.checkpoints import importing
from edgeopt.core.artifact import Checkpoint, Engine, link_tree
from edgeopt.core.config_objects import to_config
from edgeopt.core.corpus import Text
from edgeopt.core.library_versions import versions
from edgeopt.core.protocols import (
    FILES_GROUP,
    CompressionContext,
    DeviceBound,
    Lease,
    ModelSource,
    Progress,
    Runtime,
    Step,
)
from edgeopt.core.recipe import Recipe
from edgeopt.core.result import Measurement
from edgeopt.pipeline.job import EngineBench, Job

PARITY = "parity"
"""The probe that compares an engine with its own checkpoint in torch, where a bench has one of this name."""
WAIT = "wait"
"""The name under which the time is told that was spent waiting for the device or for another process's stage."""


class Work:
    """What one evaluation does; the cache of its steps, so that their stages are counted too.

    Attributes:
        now: the name of the stage that it is at.
        timings_s: seconds by stage, without waiting, which has a name of its own.
        saved_s: seconds that stages found in the store took when they were made, by the stage of this evaluation
            that asked for them; `<stage>/<kind>` where it was made itself and found a part of its work.
        kept: files and folders to keep, by name.
    """

    def __init__(self, store: StageCache, progress: Progress, lease: Lease | None = None) -> None:
        """`lease` is None where nothing is done that loads the machine."""
        self.store, self.progress, self.lease = store, progress, lease
        self.now = ""
        self.timings_s: dict[str, float] = {}
        self.saved_s: dict[str, float] = {}
        self.kept: dict[str, str] = {}
        self._seen: set[Path] = set()
        self._making = 0

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """What happens inside the block is the stage `name`."""
        self.now = name
        self.progress(name)
        started, waited_before_s = time.monotonic(), self.store.waited_s
        try:
            yield
        finally:
            waited_s = self.store.waited_s - waited_before_s
            self.timings_s[name] = time.monotonic() - started - waited_s
            self.timings_s[WAIT] = self.timings_s.get(WAIT, 0.0) + waited_s

    def keep(self, name: str, path: Path) -> None:
        if path.exists():
            self.kept[name] = str(path)

    def get_or_create(
        self,
        kind: str,
        inputs: object,
        produce: Callable[[Path], None],
        valid: Callable[[Path], bool] = lambda _: True,
    ) -> Path:
        """The store's stage; where it was found, its saving is counted once."""
        name = f"{self.now}/{kind}" if self._making else self.now

        def make(directory: Path) -> None:
            self._making += 1
            try:
                produce(directory)
            finally:
                self._making -= 1

        stage = self.store.get_or_create_stage(kind, inputs, make, valid)
        if stage.found and stage.cost_s > 0 and stage.folder not in self._seen:
            self.saved_s[name] = self.saved_s.get(name, 0.0) + stage.cost_s
        self._seen.add(stage.folder)
        return stage.folder

    def resumable_folder(self, inputs: object) -> AbstractContextManager[Path]:
        return self.store.resumable_folder(inputs)

    def fetch(self, source: ModelSource) -> Checkpoint:
        folder = source.locate()
        made = self.get_or_create(
            "model", importing.fingerprint(folder), lambda d: _discard(importing.import_checkpoint(folder, d))
        )
        return Checkpoint.read(made)

    def compress(
        self, step: Step, checkpoint: Checkpoint, original: Checkpoint, float_checkpoint: Checkpoint, calibration: Text
    ) -> Checkpoint:
        description = to_config(step)
        context = CompressionContext(
            original=original,
            float_checkpoint=float_checkpoint,
            calibration=calibration,
            cache=self,
            progress=self.progress,
        )

        def produce(directory: Path) -> None:
            with self._working():
                spec = step.apply(checkpoint, directory, context)
                made_by = {"step": description, "input": checkpoint.digest, "calibration": calibration.digest}
                Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by=made_by)

        inputs = [
            checkpoint.digest,
            importing.identity(step),
            original.digest,
            float_checkpoint.digest,
            calibration.digest,
        ]
        return Checkpoint.read(self.get_or_create("checkpoint", inputs, produce))

    def build(self, runtime: Runtime, checkpoint: Checkpoint, recipe: Recipe) -> Engine:
        description = to_config(runtime)
        decisive = {name: value for name, value in description.items() if name not in runtime.SESSION_FIELDS}
        inputs = [checkpoint.digest, runtime.build_device() if isinstance(runtime, DeviceBound) else ""]

        def produce(directory: Path) -> None:
            with self._working():
                runtime.build(checkpoint, directory, self.progress)

        def seal(directory: Path) -> None:
            link_tree(self.get_or_create("files", [*inputs, decisive], produce), directory)
            made_by = {
                "runtime": description,
                "recipe": {"text": str(recipe), "digest": recipe.digest},
                "checkpoint": checkpoint.digest,
                "versions": versions(),
            }
            Engine.seal(directory, format=runtime.format, spec=checkpoint.spec, made_by=made_by)

        return Engine.read(self.get_or_create("engine", [*inputs, description], seal))

    def baseline(self, job: Job, original: Checkpoint) -> tuple[dict[str, float], dict[str, Path]]:
        """The uncompressed model's figures, and its folder of each group of probes, measured once and kept."""
        job = replace(job, bench=job.bench.uncapped, runtime=job.runtime.baseline)
        engine = self.build(job.runtime, original, job.recipe.uncompressed(to_config(job.runtime)))
        figures: dict[str, float] = {}
        folders: dict[str, Path] = {}
        for group in job.bench.groups:
            found, folders[group] = self.measure(job, engine, original, group, {})
            figures |= {m.metric: m.value for m in found}
        return figures, folders

    def measure(
        self, job: Job, engine: Engine, checkpoint: Checkpoint, group: str, baseline: Mapping[str, Path]
    ) -> tuple[tuple[Measurement, ...], Path]:
        """The figures of one group of probes and their folder; `baseline` has the baseline's folders by group."""
        references = {"baseline": baseline[group] / "scratch"} if baseline else {}
        if PARITY in job.bench.groups[group]:
            torch = self._in_torch(job, checkpoint)
            _, folder = self._measured(job.bench, torch, job.reference, group, {}, only=PARITY)
            references["checkpoint"] = folder / "scratch"
        return self._measured(job.bench, engine, job.runtime, group, references)

    def observe(
        self, job: Job, measure: EngineBench, checkpoint: Checkpoint, original: Checkpoint
    ) -> list[Measurement]:
        """What `measure` finds of the checkpoint in torch, against the original in torch, which is looked at once."""
        figures: list[Measurement] = []
        engine, reference = self._in_torch(job, checkpoint), self._in_torch(job, original)
        for group in measure.groups:
            _, folder = self._measured(measure, reference, job.reference, group, {}, fresh=False)
            references = {"baseline": folder / "scratch"}
            figures += self._measured(measure, engine, job.reference, group, references, fresh=False)[0]
        return figures

    def gather(self, measure: EngineBench, folders: list[Path]) -> None:
        """Keep the samples, tables and logs of an engine's measurements."""
        folder = self.get_or_create("samples", list(map(str, folders)), lambda d: measure.gather(folders, d))
        for name in ("samples.json", "tables", "logs"):
            self.keep(name, folder / name)

    def _in_torch(self, job: Job, checkpoint: Checkpoint) -> Engine:
        """The reference runtime's engine of the float weights that `checkpoint` stands for."""
        float_checkpoint = replace(checkpoint, spec=checkpoint.spec.in_fp32)
        return self.build(job.reference, float_checkpoint, replace(job.recipe, runtime=to_config(job.reference)))

    def _measured(
        self,
        measure: EngineBench,
        engine: Engine,
        runtime: Runtime,
        group: str,
        references: Mapping[str, Path],
        *,
        only: str = "",
        fresh: bool = True,
    ) -> tuple[tuple[Measurement, ...], Path]:
        """The figures of a group, or of `only` one probe of it, which then keeps a reference in this process."""
        probes = (only,) if only else measure.groups[group]
        fresh = fresh and not only

        def produce(directory: Path) -> None:
            with nullcontext() if group == FILES_GROUP else self._measuring() if fresh else self._working():
                found = measure(engine, runtime, directory, references, self.progress, probes, fresh=fresh)
            (directory / "measurements.json").write_text(json.dumps([asdict(m) for m in found], indent=1) + "\n")

        inputs = [
            engine.digest,
            to_config(runtime),
            measure.identity(probes),
            fresh,
            {name: str(path) for name, path in references.items()},
        ]
        folder = self.get_or_create(
            "measurement", inputs, produce, valid=lambda d: not any(m.noisy for m in _figures(d))
        )
        return _figures(folder), folder

    def _working(self) -> AbstractContextManager[None]:
        return self._taking(nullcontext() if self.lease is None else self.lease.shared(self.progress))

    def _measuring(self) -> AbstractContextManager[None]:
        return self._taking(nullcontext() if self.lease is None else self.lease.exclusive(self.progress))

    @contextmanager
    def _taking(self, taken: AbstractContextManager[None]) -> Iterator[None]:
        with ExitStack() as held:
            with self.store.waiting():
                held.enter_context(taken)
            yield


def _figures(folder: Path) -> tuple[Measurement, ...]:
    return tuple(Measurement(**m) for m in json.loads((folder / "measurements.json").read_text()))


def _is_quiet(folder: Path) -> bool:
    return not any(m.noisy for m in _figures(folder))


def _discard(_: object) -> None:
    return None
