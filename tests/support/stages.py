"""Run single stages in tests: apply a step, build an engine, predict its metrics. Nothing is cached."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt.checkpoints.importing import COPIED_FILES
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.config_objects import to_config
from edgeopt.core.corpus import Text
from edgeopt.core.protocols import CompressionContext, Runtime, Step
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target


class NoCache:
    """Cache that stores nothing: it produces every stage again."""

    def get_or_create(self, kind: str, inputs: object, produce: Callable[[Path], None]) -> Path:
        directory = Path(tempfile.mkdtemp(prefix=f"edgeopt-{kind}-"))
        produce(directory)
        return directory

    @contextmanager
    def resumable_folder(self, inputs: object) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def compression_context(original: Checkpoint, calibration: Text | None = None) -> CompressionContext:
    """Return the context of a step that follows no other step."""
    default_text = Text(name="calibration", documents=("def read(path):\n    return open(path).read()\n" * 20,))
    return CompressionContext(
        original=original,
        float_checkpoint=original,
        calibration=calibration or default_text,
        cache=NoCache(),
        progress=lambda _: None,
    )


def apply_step(step: Step, checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """Apply a step to a checkpoint and seal the result in the new folder `directory`."""
    directory.mkdir()
    spec = step.apply(checkpoint, directory, compression_context(checkpoint))
    return Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by={})


def build_engine(runtime: Runtime, checkpoint: Checkpoint, directory: Path) -> Engine:
    """Build the engine of a checkpoint in the new folder `directory`."""
    directory.mkdir()
    runtime.build(checkpoint, directory, lambda _: None)
    return Engine.seal(directory, format=runtime.format, spec=checkpoint.spec, made_by={"runtime": to_config(runtime)})


def predict_metric(runtime: Runtime, engine: Engine, metric: str = "size/engine_mib") -> list[Measurement]:
    """Return the runtime's predictions of `metric` for a built engine; empty if it does not predict the metric."""
    copied_bytes = sum(file.size_bytes for file in engine.files if file.path in COPIED_FILES)
    predictions = runtime.predict(engine.spec, Target(name="device", context_length=64), copied_bytes=copied_bytes)
    return [prediction for prediction in predictions if prediction.metric == metric]
