"""Define the protocols that models, texts, techniques, runtimes, probes and trackers implement.

An implementation is a frozen dataclass (a config object, see `edgeopt.core.config_objects`) and inherits nothing from
this module. `tests/contracts/` holds one test suite for each protocol and runs it against every implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.corpus import Text
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.result import Measurement, TrialResult
    from edgeopt.core.target import Target

Progress = Callable[[str], None]
"""Callback that receives one short line about the current activity."""


@runtime_checkable
class ModelSource(Protocol):
    """Source of a checkpoint."""

    def locate(self) -> Path:
        """Return the local folder of the model in Hugging Face layout. Download a remote model first.

        Raises:
            InputError: the model does not exist or is not safe to load.
        """
        ...


class TextSource(Protocol):
    """Source of calibration or evaluation text."""

    def load(self) -> Text:
        """Return all documents.

        Raises:
            InputError: the source is missing, unreadable or empty.
        """
        ...


class Cache(Protocol):
    """Store for expensive intermediate results that several steps or trials share."""

    def get_or_create(self, kind: str, inputs: object, produce: Callable[[Path], None]) -> Path:
        """Return the folder of the entry for `inputs`. Call `produce` with an empty folder if there is no entry.

        Args:
            kind: type of entry, such as `checkpoint` or `engine`.
            inputs: plain JSON data that determines the content.
            produce: writes the content into the folder that it receives.
        """
        ...

    def resumable_folder(self, inputs: object) -> AbstractContextManager[Path]:
        """Return a context with a folder for the state of a long task.

        The folder survives a kill or an exception and is deleted when the block ends normally.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionContext:
    """Inputs of a compression step in addition to its checkpoint.

    Attributes:
        original: the uncompressed model of the recipe, the default teacher.
        float_checkpoint: the latest checkpoint of this recipe with all weights in fp32.
        calibration: text to calibrate and train on.
        cache: store that this step shares with other steps and trials.
        progress: receives progress lines.
    """

    original: Checkpoint
    float_checkpoint: Checkpoint
    calibration: Text
    cache: Cache
    progress: Progress


class Step(Protocol):
    """Compression technique."""

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec after this step, by arithmetic only. Sizes that depend on data are predicted as uniform.

        Raises:
            ConfigError: the step cannot follow the previous steps, or its values do not fit the model's sizes.
        """
        ...

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the files of the compressed checkpoint into the empty `directory` and return its actual spec.

        Equal inputs give equal bytes. Files under `directory/artifacts` are recorded with the trial and are not part
        of the weights.

        Raises:
            StepError: the technique fails on a valid checkpoint.
        """
        ...


@runtime_checkable
class ErrorReducing(Protocol):
    """Step that loses less than the simplest method for the same task, or recovers the error of earlier steps."""

    @property
    def remaining_error(self) -> float:
        """Return the typical fraction of the error that remains, 1 for no improvement.

        It refers to the step's own error or, for a step without error of its own, to the error of the steps before.
        """
        ...


class Session(Protocol):
    """Engine opened for inference, one sequence at a time.

    Each call may name one adapter of the engine; without a name it computes the base model. An unknown name raises
    ConfigError.
    """

    @property
    def backends(self) -> Sequence[str]:
        """Return the execution providers, backends or GPUs in use, the one with most of the work first."""
        ...

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        """Decode greedily and yield each token id as soon as it is known.

        With `stop_at_end`, the end-of-sequence token ends the iteration and is not yielded.
        """
        ...

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Return next-token logits at every position, without cached context: float32, (tokens, vocabulary)."""
        ...

    def close(self) -> None:
        """Release all resources of the session. A second call has no effect."""
        ...


@runtime_checkable
class DistributedSession(Protocol):
    """Session that runs parts of the engine in other processes; memory of this process covers the rest only."""

    @property
    def processes(self) -> Sequence[str]:
        """Return one description for each process: host, process id and the part of the engine that it holds."""
        ...


class Runtime(Protocol):
    """Builder of engines from checkpoints, and opener of engines."""

    format: ClassVar[str]
    """Name and version of the engine layout, stored in the engine's manifest."""
    LIBRARIES: ClassVar[tuple[str, ...]]
    """Modules that `open` imports. The measured process imports them before it loads an engine."""
    SESSION_FIELDS: ClassVar[frozenset[str]]
    """Fields that affect `open` only. Engines that differ in these fields alone consist of the same files."""

    @property
    def fallback(self) -> Runtime | None:
        """Return the runtime for models that `check` rejects, or None. The user is informed about the switch."""
        ...

    @property
    def baseline(self) -> Runtime:
        """Return the variant of this runtime that measures the uncompressed model.

        It is lossless and has no memory or time budget, so that a comparison shows the effect of both.
        """
        ...

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if this runtime does not support the model. The pipeline calls it before any work."""
        ...

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        """Return metrics of an engine by arithmetic, each with an interval. Limits are judged by this interval.

        Metrics that the runtime cannot predict are omitted. The call takes milliseconds.

        Args:
            spec: model to build.
            target: device and run settings.
            copied_bytes: size of the files that an engine copies from its model, such as the tokenizer.
        """
        ...

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        """Write the engine's files into the empty `directory`.

        Raises:
            BuildError: the engine cannot be built.
        """
        ...

    def lint(self, engine: Engine) -> list[str]:
        """Return one sentence for each known slow path in the engine."""
        ...

    def open(self, engine: Engine, *, threads: int) -> Session:
        """Open an engine for inference on `threads` compute threads.

        Raises:
            BuildError: the engine has another format or cannot be loaded.
        """
        ...


@runtime_checkable
class DeviceBound(Protocol):
    """Runtime that builds engines on the target device only. Elsewhere `build` writes a build plan instead."""

    def build_device(self) -> str:
        """Return the local device that engines are built for, or an empty string if this machine cannot build."""
        ...


@runtime_checkable
class SupportsBreakdown(Protocol):
    """Runtime that predicts the size of each part of an engine by arithmetic."""

    def breakdown(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> Mapping[str, int]:
        """Return bytes by part: parts on disk and their sum, then parts in memory and their sum.

        The arguments are those of `Runtime.predict`.
        """
        ...


@runtime_checkable
class SupportsAffinity(Protocol):
    """Runtime that can pin each thread to a CPU."""

    def cpu_ids(self, threads: int) -> Sequence[int]:
        """Return the CPU of each of `threads` threads, or an empty sequence if threads are not pinned.

        Raises:
            BuildError: this process may not use one of the CPUs.
        """
        ...


FILES_GROUP = "files"
"""Group of probes that read the engine's files only. They run without a process and open no session."""
GENERATION_GROUP = "generation"
"""Group of probes whose processes only generate text, as in serving. The target's memory cap applies to them."""

Samples = Mapping[str, Any]
"""Raw values of one process in plain JSON types. The keys belong to the probe."""


class ProbeContext(Protocol):
    """Engine under test and its inputs, as a probe sees them inside the measured process."""

    engine: Engine
    session: Session
    threads: int
    context_length: int
    """Maximum tokens of one sequence, prompt and generated text together, for this engine on the target."""
    memory_cap_bytes: int
    """Requested memory cap of this process, 0 for none. The kernel reports whether it is in effect."""
    prompts: Mapping[int, list[int]]
    """Prompt token ids by prompt length in tokens."""
    documents: list[list[int]]
    """Evaluation windows of token ids. Each is evaluated without preceding context."""
    references: Mapping[str, Path]
    """Scratch folders of reference engines, if available: `baseline` (the uncompressed model on the same runtime) and
    `checkpoint` (this engine's own float weights on the torch runtime)."""
    scratch: Path
    """Folder that outlives the process. Later engines use its content as a reference."""
    marks: Mapping[str, Mapping[str, float]]
    """Time and memory at the start of the process (`bare`), after imports (`imported`) and after loading (`loaded`)."""


class Probe(Protocol):
    """Measurement of one aspect of an engine.

    `collect` runs inside fresh processes, `summarize` outside of them.
    """

    METRICS: ClassVar[Mapping[str, str]]
    """Unit of every metric that the probe may report, by metric name."""
    GROUP: ClassVar[str]
    """Probes of the same group share their processes. Probes in `FILES_GROUP` need none."""
    TIMING_SENSITIVE: ClassVar[bool]
    """True if load from other processes distorts the values."""
    processes: int
    """Number of fresh processes to collect samples in."""

    def collect(self, context: ProbeContext) -> Samples:
        """Return the raw values of one process."""
        ...

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return metrics with confidence intervals from the samples of all processes."""
        ...


class Lease(Protocol):
    """Reader-writer lock on a device: exclusive for one measurement, shared for jobs that load all cores.

    Both locks are reentrant within a thread. Hosts that share a device need a lease outside of their file systems.
    """

    def exclusive(self, progress: Progress) -> AbstractContextManager[None]:
        """Hold the device alone inside the block. Wait for all other holders first."""
        ...

    def shared(self, progress: Progress) -> AbstractContextManager[None]:
        """Hold the device together with other shared holders. Wait for exclusive holders and waiters first."""
        ...


class Recorder(Protocol):
    """Tracker of studies and trials, such as MLflow."""

    def record(self, number: int, params: Mapping[str, Any], config: Mapping[str, Any], result: TrialResult) -> str:
        """Log a finished trial and return its run id. Repeated calls for the same trial log it once."""
        ...
