"""A place for steps to work in, for tests, and for runtimes to build in: nothing is kept between two of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt.checkpoints.importing import CARRIED_FILES
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.config_objects import to_config
from edgeopt.core.corpus import Text
from edgeopt.core.protocols import CompressionContext, Runtime, Step
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target


class NoCache:
    """Makes every stage anew."""

    def get_or_create(self, kind: str, inputs: object, produce: Callable[[Path], None]) -> Path:
        directory = Path(tempfile.mkdtemp(prefix=f"edgeopt-{kind}-"))
        produce(directory)
        return directory

    @contextmanager
    def resumable_folder(self, inputs: object) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def compression_context(original: Checkpoint, calibration: Text | None = None) -> CompressionContext:
    words = Text(name="calibration", documents=("def read(path):\n    return open(path).read()\n" * 20,))
    return CompressionContext(
        original=original,
        float_checkpoint=original,
        calibration=calibration or words,
        cache=NoCache(),
        progress=lambda _: None,
    )


def apply_step(step: Step, checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """What a step makes of a checkpoint, in a new folder."""
    directory.mkdir()
    spec = step.apply(checkpoint, directory, compression_context(checkpoint))
    return Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by={})


def build_engine(runtime: Runtime, checkpoint: Checkpoint, directory: Path) -> Engine:
    """The engine of a checkpoint in a new folder."""
    directory.mkdir()
    runtime.build(checkpoint, directory, lambda _: None)
    return Engine.seal(directory, format=runtime.format, spec=checkpoint.spec, made_by={"runtime": to_config(runtime)})


def predicted_figures(runtime: Runtime, engine: Engine, metric: str = "size/engine_mib") -> list[Measurement]:
    """What arithmetic says of an engine that was built; empty where it says nothing."""
    carried_bytes = sum(file.size_bytes for file in engine.files if file.path in CARRIED_FILES)
    found = runtime.predict(engine.spec, Target(name="device", context_length=64), carried_bytes=carried_bytes)
    return [figure for figure in found if figure.metric == metric]
