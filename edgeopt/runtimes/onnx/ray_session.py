"""Run the shards of one engine in several processes, on one host or on several, as actors of a Ray cluster.

The processes form a pipeline that each token passes in order. Each holds the weights of its shards, and their keys and
values. It reads the weights from the engine's folder, which must have the same path on every host. The session joins
the cluster at RAY_ADDRESS, or starts one on this machine.
"""

from __future__ import annotations

import logging
import os
import uuid
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from edgeopt.checkpoints import adapters
from edgeopt.checkpoints.tokenizer import eos_token_ids
from edgeopt.errors import BuildError, MeasureError
from edgeopt.runtimes.decoding.chunked_prefill import resolve_chunk_tokens
from edgeopt.runtimes.decoding.incremental_session import IncrementalSession
from edgeopt.runtimes.onnx import graph, shards
from edgeopt.runtimes.onnx.kv_cache import CacheCapacity, StaticCache
from edgeopt.runtimes.onnx.weight_streaming import open_shards

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.runtimes.onnx.runtime import PortableOnnx

Values = Mapping[str, np.ndarray]
"""Arrays that cross between processes, by name."""


class RaySession(IncrementalSession):
    """One engine whose shards run in a pipeline of processes.

    If a process ends, its open sequences are lost. The next sequence starts all processes again.

    Attributes:
        processes: process id, host and shards of each process.
        backends: execution providers, which are the same in all processes.
    """

    processes: Sequence[str] = ()
    backends: Sequence[str] = ()

    def __init__(self, runtime: PortableOnnx, engine: Engine, threads: int) -> None:
        self._runtime, self._engine, self._threads = runtime, engine, threads
        self._eos_token_ids = eos_token_ids(engine.directory)
        self._chunk_tokens = resolve_chunk_tokens(engine.directory, engine.spec, runtime.prompt_tokens)
        self._draft_tokens = runtime.prompt_lookup
        count = len(shards.read(engine.directory))
        if count < runtime.processes:
            raise BuildError(
                f"`processes` must be at most the engine's {count} shards, got {runtime.processes}",
                location=str(engine.directory),
                hint="Use fewer processes, or build the engine with more runtime.shards",
            )
        bounds = [count * number // runtime.processes for number in range(runtime.processes + 1)]
        self._selections = [range(*pair) for pair in pairwise(bounds)]
        self._owns_cluster = not ray.is_initialized()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        self._stages: list[Any] = []
        self._start()

    def close(self) -> None:
        self._stop()
        if self._owns_cluster and ray.is_initialized():
            ray.shutdown()

    def _new_sequence(self, length: int, adapter: str | None) -> _Sequence:
        adapters.require(adapter, self._engine.spec)
        factors = adapters.read_arrays(self._engine.directory, adapter) if adapter else {}
        if not self._stages:
            self._start()
        capacity = CacheCapacity(length, self._chunk_tokens, self._runtime.kv_window)
        sequence_id = uuid.uuid4().hex
        self._get([stage.begin.remote(sequence_id, capacity, factors) for stage in self._stages])
        return _Sequence(self, self._stages, sequence_id)

    def _start(self) -> None:
        stage_actor = ray.remote(_PipelineStage).options(num_cpus=0, scheduling_strategy="SPREAD")
        arguments = str(self._engine.directory.absolute()), self._runtime, self._threads
        self._stages = [stage_actor.remote(*arguments, selection) for selection in self._selections]
        descriptions = self._get([stage.describe.remote() for stage in self._stages])
        locations, providers, input_names = zip(*descriptions, strict=True)
        for number, stage in enumerate(self._stages):
            stage.set_forwarded_names.remote(set().union(*input_names[number + 1 :]))
        self.backends = providers[0]
        self.processes = tuple(
            f"{location}, shards {selection.start} to {selection.stop - 1}"
            for location, selection in zip(locations, self._selections, strict=True)
        )

    def _stop(self) -> None:
        for stage in self._stages:
            ray.kill(stage)
        self._stages = []

    def _get(self, references: Sequence[Any]) -> list[Any]:
        """Return the results of remote calls.

        Raises MeasureError if a process has ended, and the original error of a call that failed.
        """
        try:
            results: list[Any] = ray.get(list(references))
        except ray.exceptions.RayActorError as error:
            ended = [number for number, stage in enumerate(self._stages) if stage._actor_id.hex() == error.actor_id]
            description = self.processes[ended[0]] if ended and self.processes else "unknown process"
            self._stop()
            raise MeasureError(
                f"a process of the distributed engine has ended ({description})",
                location="runtime.processes",
                hint="Send the request again; the processes are started again",
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return results


class _Sequence:
    """The state of one sequence, distributed over all processes."""

    def __init__(self, session: RaySession, stages: Sequence[Any], sequence_id: str) -> None:
        self._session, self._stages, self._id = session, tuple(stages), sequence_id
        weakref.finalize(self, _discard, self._stages, sequence_id).atexit = False

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        values: Any = {}
        for stage in self._stages:
            values = stage.forward.remote(self._id, list(tokens), list(rows), values)
        logits: np.ndarray = self._session._get([values])[0][graph.LOGITS]
        return np.array(logits)

    def rollback(self, count: int) -> None:
        for stage in self._stages:
            stage.rollback.remote(self._id, count)


def _discard(stages: Sequence[Any], sequence_id: str) -> None:
    """Free the state of a sequence in all processes that are still running."""
    if ray.is_initialized():
        with suppress(ray.exceptions.RayError):
            for stage in stages:
                stage.discard.remote(sequence_id)


class _PipelineStage:
    """Consecutive shards in one process, with the caches of all open sequences."""

    def __init__(self, directory: str, runtime: PortableOnnx, threads: int, selection: range) -> None:
        self._session = open_shards(Path(directory), runtime, threads, selection)
        self._forwarded_names: Collection[str] = ()
        self._sequences: dict[str, StaticCache] = {}

    def describe(self) -> tuple[str, Sequence[str], set[str]]:
        """Return the location of the process, its execution providers and the names of its inputs."""
        location = f"process {os.getpid()} on {os.uname().nodename}"
        return location, tuple(self._session.get_providers()), set().union(*self._session.input_names)

    def set_forwarded_names(self, names: Collection[str]) -> None:
        """Set the names of the values that later processes read."""
        self._forwarded_names = names

    def begin(self, sequence_id: str, capacity: CacheCapacity, factors: Values) -> None:
        """Create the cache of a sequence."""
        computed = {name for names in self._session.output_names for name in names}
        self._sequences[sequence_id] = StaticCache(
            self._session,
            capacity,
            factors,
            "cpu",
            self._session.allocate,
            output_names=sorted(computed & set(self._forwarded_names)),
        )

    def forward(
        self, sequence_id: str, tokens: Sequence[int], rows: Sequence[int], received: Values
    ) -> dict[str, np.ndarray]:
        """Append tokens and return the values that later processes read; the last process returns the logits."""
        forwarded = {name: array for name, array in received.items() if name in self._forwarded_names}
        return forwarded | self._sequences[sequence_id].run(tokens, rows, received)

    def rollback(self, sequence_id: str, count: int) -> None:
        """Remove the last `count` tokens of a sequence."""
        self._sequences[sequence_id].rollback(count)

    def discard(self, sequence_id: str) -> None:
        """Free the cache of a sequence."""
        self._sequences.pop(sequence_id, None)
