"""What the pipeline knows of models, texts, techniques, runtimes, probes and trackers.

Every implementation is a frozen dataclass (a part, see edgeopt.core.config_objects) that inherits nothing from
here. `tests/contracts/` holds one suite a port and runs it against every implementation.
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
"""Called with one short line on what is being done."""


@runtime_checkable
class ModelSource(Protocol):
    """Where a checkpoint comes from."""

    def locate(self) -> Path:
        """The local folder of the model in Hugging Face layout, downloaded where it is remote.

        Raises InputError where the model does not exist or is not safe to load.
        """
        ...


class TextSource(Protocol):
    """Where calibration or evaluation text comes from."""

    def load(self) -> Text:
        """All documents. Raises InputError for a missing, unreadable or empty source."""
        ...


class Cache(Protocol):
    """Keeps what is expensive to find out and serves more than one step or trial."""

    def get_or_create(self, kind: str, inputs: object, produce: Callable[[Path], None]) -> Path:
        """The folder that `produce` fills, made once for equal `inputs` (plain JSON data that determine it)."""
        ...

    def resumable_folder(self, inputs: object) -> AbstractContextManager[Path]:
        """A folder for the state of long work, which is there again after a kill and goes when the work is done."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionContext:
    """What a step works with beside the checkpoint.

    Attributes:
        original: the uncompressed model of the recipe, which teaches where no other teacher is named.
        floating: the checkpoint of this recipe whose weights were the last to be in fp32.
    """

    original: Checkpoint
    float_checkpoint: Checkpoint
    calibration: Text
    cache: Cache
    progress: Progress


class Step(Protocol):
    """A compression technique."""

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """The model after this step, by arithmetic; sizes that depend on data are predicted as uniform.

        Raises ConfigError where the step cannot follow what was done or its values do not fit the sizes.
        """
        ...

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the compressed checkpoint's files into the empty `directory`; return its true spec.

        Files under `directory/artifacts` are kept beside the trial and are no part of the checkpoint's
        weights. The same input gives the same bytes. Raises StepError.
        """
        ...


@runtime_checkable
class ErrorReducing(Protocol):
    """A step that loses less than the plainest way to do the same, or makes good what was lost before it."""

    @property
    def remaining_error(self) -> float:
        """The share of the loss that remains as a rule; of what was lost before where the step itself loses nothing."""
        ...


class Session(Protocol):
    """An engine opened for inference; one sequence at a time.

    Each call may name one of the engine's adapters, and computes the base without; ConfigError for an unknown name.
    """

    @property
    def backends(self) -> Sequence[str]:
        """What really computes, first what computes most: a provider, a backend, a GPU."""
        ...

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        """Greedy decoding: token ids one by one, each yielded as soon as it is known.

        With `stop_at_end` the end-of-sequence token ends the iteration and is not yielded.
        """
        ...

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Next-token logits at every position from an empty past: float32, shape (tokens, vocabulary)."""
        ...

    def close(self) -> None:
        """Release what the session holds; calling it twice does no harm."""
        ...


@runtime_checkable
class DistributedSession(Protocol):
    """A session of which a part lies in other processes: figures of memory would be those of the rest."""

    @property
    def processes(self) -> Sequence[str]:
        """Where they run and what each of them holds."""
        ...


class Runtime(Protocol):
    """Builds engines from checkpoints and opens them."""

    format: ClassVar[str]
    """Name and version of the engine layout, as written into the engine's manifest."""
    LIBRARIES: ClassVar[tuple[str, ...]]
    """Modules that `open` imports: the measured process imports them before it loads an engine."""
    SESSION_FIELDS: ClassVar[frozenset[str]]
    """Fields that decide how an engine is opened alone: engines that differ in them have the same files."""

    @property
    def fallback(self) -> Runtime | None:
        """The runtime that takes what `check` refuses, where one does; it is told to the user."""
        ...

    @property
    def baseline(self) -> Runtime:
        """This one on which the original model is measured to be compared with.

        It loses nothing by itself and has no budget, so that a model shows what was lost and what a budget saves.
        """
        ...

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where this runtime cannot take such a model; called before any work."""
        ...

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        """Figures of an engine by arithmetic, each with the band by which limits are judged.

        `carried_bytes` are those of files that an engine takes over from its model, such as the tokenizer. What is
        not known of this runtime is left out. Costs milliseconds.
        """
        ...

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        """Write the engine's files into the empty `directory`. Raises BuildError."""
        ...

    def lint(self, engine: Engine) -> list[str]:
        """Known slow paths that the engine would take, one sentence each; empty where it is clean."""
        ...

    def open(self, engine: Engine, *, threads: int) -> Session:
        """Raises BuildError where the engine is of another format or cannot be loaded."""
        ...


@runtime_checkable
class DeviceBound(Protocol):
    """A runtime whose engines are built on the device that runs them; elsewhere it leaves the plan of one."""

    def build_device(self) -> str:
        """What engines are built for on this machine; empty where it can build none."""
        ...


@runtime_checkable
class SupportsBreakdown(Protocol):
    """A runtime that knows by arithmetic what each part of an engine takes."""

    def breakdown(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> Mapping[str, int]:
        """Bytes by name: those on disk and their sum, then those in memory and their sum. As `predict` else."""
        ...


@runtime_checkable
class SupportsAffinity(Protocol):
    """A runtime that may have a processor of its own for each thread."""

    def cpu_ids(self, threads: int) -> Sequence[int]:
        """Those of `threads` threads; none where they may move. BuildError where this process may not use them."""
        ...


FILES_GROUP = "files"
"""The group of probes that look at an engine's files alone: they collect without a process, and nothing is opened."""
GENERATION_GROUP = "generation"
"""The group of probes whose processes do what serving does and no more: the target's memory cap holds these."""

Samples = Mapping[str, Any]
"""Raw figures of one process in plain JSON types, by a probe's own names."""


class ProbeContext(Protocol):
    """What a probe sees inside the measured process."""

    engine: Engine
    session: Session
    threads: int
    context_length: int
    """Tokens, prompt and generated together, that one sequence may hold on the target with this engine."""
    memory_cap_bytes: int
    """What this process was to be held to; 0: nothing. Whether it is, the kernel says."""
    prompts: Mapping[int, list[int]]
    """A prompt of token ids for each prompt length that the workload names."""
    documents: list[list[int]]
    """Evaluation windows of token ids, each from an empty past."""
    references: Mapping[str, Path]
    """Scratch folders of engines measured before: `baseline` (the uncompressed model on the same runtime) and
    `checkpoint` (the torch runtime on this engine's own float weights), where they exist."""
    scratch: Path
    """A folder that outlives the process; what lies in it serves later subjects as a reference."""
    marks: Mapping[str, Mapping[str, float]]
    """Time and memory when the process was `bare`, had `imported` the runtime and had `loaded` the engine."""


class Probe(Protocol):
    """Measures one aspect of an engine: `collect` inside fresh processes, `summarize` outside them."""

    METRICS: ClassVar[Mapping[str, str]]
    """Every metric that the probe may report, with its unit."""
    GROUP: ClassVar[str]
    """Probes of one group share their processes; others never do. Those of the group FILES_GROUP need none."""
    TIMING_SENSITIVE: ClassVar[bool]
    """Whether load of other processes spoils the figures."""
    processes: int
    """How many fresh processes are asked for samples."""

    def collect(self, context: ProbeContext) -> Samples: ...

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]: ...


class Lease(Protocol):
    """Who may use the device: one measurement alone, or any number of those who work on all its cores.

    Neither waits for what the same thread has already. Several hosts that share a device need another one than
    files on one of them.
    """

    def exclusive(self, progress: Progress) -> AbstractContextManager[None]:
        """Have the device alone inside the block, after those who measure or work have ended."""
        ...

    def shared(self, progress: Progress) -> AbstractContextManager[None]:
        """Nobody measures inside the block; it begins after those who measure, or wait to, have ended."""
        ...


class Recorder(Protocol):
    """Keeps studies and trials where people compare them."""

    def record(self, number: int, params: Mapping[str, Any], config: Mapping[str, Any], result: TrialResult) -> str:
        """Log one finished trial once, however often it is called for it; return its run id."""
        ...
