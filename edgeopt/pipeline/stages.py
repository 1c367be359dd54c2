"""Define the stages of an evaluation: fetch, compress, build, measure the baseline and the engine, observe, merge.

Each function takes its result from the cache of the runner, or produces it there. The `inputs` of `get_or_create` are
the cache key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from edgeopt.checkpoints import importing
from edgeopt.core.artifact import Checkpoint, Engine, link_tree
from edgeopt.core.config_objects import to_config
from edgeopt.core.corpus import Text
from edgeopt.core.library_versions import versions
from edgeopt.core.protocols import FILES_GROUP, CompressionContext, DeviceBound, ModelSource, Runtime, Step
from edgeopt.core.recipe import Recipe
from edgeopt.core.result import Measurement
from edgeopt.pipeline.job import EngineBench, Job
from edgeopt.pipeline.stage_runner import StageRunner

PARITY = "parity"
"""Name of the probe that compares an engine with its own checkpoint in PyTorch."""


def fetch(runner: StageRunner, source: ModelSource) -> Checkpoint:
    """Import the model into the cache and return it."""
    folder = source.locate()

    def produce(directory: Path) -> None:
        importing.import_checkpoint(folder, directory)

    return Checkpoint.read(runner.get_or_create("model", importing.fingerprint(folder), produce))


def compress(
    runner: StageRunner,
    step: Step,
    checkpoint: Checkpoint,
    original: Checkpoint,
    float_checkpoint: Checkpoint,
    calibration: Text,
) -> Checkpoint:
    """Apply one compression step to `checkpoint` and return the result.

    Args:
        original: the uncompressed model.
        float_checkpoint: the latest checkpoint of this recipe with all weights in fp32.
        calibration: the text that data-dependent steps read.
    """
    context = CompressionContext(
        original=original,
        float_checkpoint=float_checkpoint,
        calibration=calibration,
        cache=runner,
        progress=runner.progress,
    )

    def produce(directory: Path) -> None:
        with runner.shared_device():
            spec = step.apply(checkpoint, directory, context)
            made_by = {"step": to_config(step), "input": checkpoint.digest, "calibration": calibration.digest}
            Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by=made_by)

    inputs = [
        checkpoint.digest,
        importing.step_identity(step),
        original.digest,
        float_checkpoint.digest,
        calibration.digest,
    ]
    return Checkpoint.read(runner.get_or_create("checkpoint", inputs, produce))


def build(runner: StageRunner, runtime: Runtime, checkpoint: Checkpoint, recipe: Recipe) -> Engine:
    """Build the engine of `checkpoint`.

    The engine's files are a separate stage, shared by runtimes that differ only in session options.
    """
    config = to_config(runtime)
    build_config = {name: value for name, value in config.items() if name not in runtime.SESSION_FIELDS}
    inputs = [checkpoint.digest, runtime.build_device() if isinstance(runtime, DeviceBound) else ""]

    def produce_files(directory: Path) -> None:
        with runner.shared_device():
            runtime.build(checkpoint, directory, runner.progress)

    def produce_engine(directory: Path) -> None:
        link_tree(runner.get_or_create("files", [*inputs, build_config], produce_files), directory)
        made_by = {
            "runtime": config,
            "recipe": {"text": str(recipe), "digest": recipe.digest},
            "checkpoint": checkpoint.digest,
            "versions": versions(),
        }
        Engine.seal(directory, format=runtime.format, spec=checkpoint.spec, made_by=made_by)

    return Engine.read(runner.get_or_create("engine", [*inputs, config], produce_engine))


def measure_baseline(runner: StageRunner, job: Job, original: Checkpoint) -> tuple[dict[str, float], dict[str, Path]]:
    """Measure the uncompressed model without the target's memory cap, on the baseline variant of the job's runtime.

    Return its values by metric and its measurement folders by probe group.
    """
    job = replace(job, bench=job.bench.uncapped, runtime=job.runtime.baseline)
    engine = build(runner, job.runtime, original, job.recipe.uncompressed(to_config(job.runtime)))
    values: dict[str, float] = {}
    folders: dict[str, Path] = {}
    for group in job.bench.groups:
        measurements, folders[group] = measure_group(runner, job, engine, original, group, {})
        values |= {m.metric: m.value for m in measurements}
    return values, folders


def measure_group(
    runner: StageRunner,
    job: Job,
    engine: Engine,
    checkpoint: Checkpoint,
    group: str,
    baseline_folders: Mapping[str, Path],
) -> tuple[tuple[Measurement, ...], Path]:
    """Measure one group of probes and return its measurements and their folder.

    Args:
        baseline_folders: measurement folders of the baseline by probe group; empty for the baseline itself.
    """
    references = {"baseline": baseline_folders[group] / "scratch"} if baseline_folders else {}
    if PARITY in job.bench.groups[group]:
        torch_engine = _build_reference(runner, job, checkpoint)
        _, folder = _measure(runner, job.bench, torch_engine, job.reference, group, [PARITY], {}, isolated=False)
        references["checkpoint"] = folder / "scratch"
    return _measure(runner, job.bench, engine, job.runtime, group, job.bench.groups[group], references)


def observe(
    runner: StageRunner, job: Job, bench: EngineBench, checkpoint: Checkpoint, original: Checkpoint
) -> list[Measurement]:
    """Measure `checkpoint` relative to `original`, both in PyTorch, before an engine is built."""
    measurements: list[Measurement] = []
    engine, baseline = _build_reference(runner, job, checkpoint), _build_reference(runner, job, original)
    for group, probes in bench.groups.items():
        _, folder = _measure(runner, bench, baseline, job.reference, group, probes, {}, isolated=False)
        references = {"baseline": folder / "scratch"}
        measurements += _measure(runner, bench, engine, job.reference, group, probes, references, isolated=False)[0]
    return measurements


def merge_samples(runner: StageRunner, bench: EngineBench, folders: Sequence[Path]) -> None:
    """Merge the samples, tables and logs of an engine's probe groups and keep them as artifacts."""
    folder = runner.get_or_create("samples", list(map(str, folders)), lambda d: bench.merge_samples(folders, d))
    for name in ("samples.json", "tables", "logs"):
        runner.keep_artifact(name, folder / name)


def _build_reference(runner: StageRunner, job: Job, checkpoint: Checkpoint) -> Engine:
    """Return the reference runtime's engine of the fp32 weights that `checkpoint` represents."""
    float_checkpoint = replace(checkpoint, spec=checkpoint.spec.in_fp32)
    return build(runner, job.reference, float_checkpoint, replace(job.recipe, runtime=to_config(job.reference)))


def _measure(
    runner: StageRunner,
    bench: EngineBench,
    engine: Engine,
    runtime: Runtime,
    group: str,
    probes: Sequence[str],
    references: Mapping[str, Path],
    *,
    isolated: bool = True,
) -> tuple[tuple[Measurement, ...], Path]:
    """Measure `probes` of `group` and return their measurements and folder.

    Cached measurements are measured again if one of them is noisy.
    """

    def produce(directory: Path) -> None:
        lease: AbstractContextManager[None] = nullcontext()  # probes of files need no device
        if group != FILES_GROUP:
            lease = runner.exclusive_device() if isolated else runner.shared_device()
        with lease:
            measurements = bench(engine, runtime, directory, references, runner.progress, probes, isolated=isolated)
        document = json.dumps([asdict(m) for m in measurements], indent=1)
        (directory / "measurements.json").write_text(document + "\n")

    inputs = [
        engine.digest,
        to_config(runtime),
        bench.identity(probes),
        isolated,
        {name: str(path) for name, path in references.items()},
    ]
    folder = runner.get_or_create("measurement", inputs, produce, is_valid=_is_undisturbed)
    return _read_measurements(folder), folder


def _is_undisturbed(folder: Path) -> bool:
    return not any(m.noisy for m in _read_measurements(folder))


def _read_measurements(folder: Path) -> tuple[Measurement, ...]:
    return tuple(Measurement(**m) for m in json.loads((folder / "measurements.json").read_text()))
