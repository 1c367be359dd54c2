"""The shards of one engine in several processes, of one host or of several: actors of a Ray cluster.

Each token passes through all of them in turn. A process has the weights of its shards, and their keys and values; it
reads them from the engine's folder, which every host has to reach under the same path. Ray is joined by RAY_ADDRESS, or
started here.
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
from edgeopt.runtimes.onnx import graph, shards, weight_streaming
from edgeopt.runtimes.onnx.kv_cache import Room, Slots

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.runtimes.onnx.runtime import PortableOnnx

Values = Mapping[str, np.ndarray]
"""By their names, what shards elsewhere computed."""


class RaySession(IncrementalSession):
    """An engine whose shards lie in processes one behind another.

    One that ends takes the sequences that it was reading with it; what is asked next starts all of them anew.

    Attributes:
        processes: host, process id and shards of each.
        backends: as in edgeopt.core.protocols.Session; the same in all of them.
    """

    processes: Sequence[str] = ()
    backends: Sequence[str] = ()

    def __init__(self, runtime: PortableOnnx, engine: Engine, threads: int) -> None:
        self._runtime, self._engine, self._threads = runtime, engine, threads
        self._end_tokens = eos_token_ids(engine.directory)
        self._chunk_tokens = resolve_chunk_tokens(engine.directory, engine.spec, runtime.prompt_tokens)
        self._draft_tokens = runtime.prompt_lookup
        count = len(shards.read(engine.directory))
        if count < runtime.processes:
            raise BuildError(
                f"it was cut into {count} shards, which are fewer than {runtime.processes} processes",
                location=str(engine.directory),
                hint="Give fewer, or build it with more runtime.shards",
            )
        bounds = [count * number // runtime.processes for number in range(runtime.processes + 1)]
        self._parts = [range(*pair) for pair in pairwise(bounds)]
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
        factors = adapters.arrays(self._engine.directory, adapter) if adapter else {}
        if not self._stages:
            self._start()
        name, room = uuid.uuid4().hex, Room(length, self._chunk_tokens, self._runtime.kv_window)
        self._told([stage.begin.remote(name, room, factors) for stage in self._stages])
        return _Sequence(self, self._stages, name)

    def _start(self) -> None:
        stage = ray.remote(_Stage).options(num_cpus=0, scheduling_strategy="SPREAD")
        given = str(self._engine.directory.absolute()), self._runtime, self._threads
        self._stages = [stage.remote(*given, part) for part in self._parts]
        places, providers, reads = zip(*self._told([one.described.remote() for one in self._stages]), strict=True)
        for number, one in enumerate(self._stages):
            one.pass_on.remote(set().union(*reads[number + 1 :]))
        self.backends = providers[0]
        self.processes = tuple(
            f"{node}, shards {part.start} to {part.stop - 1}" for node, part in zip(places, self._parts, strict=True)
        )

    def _stop(self) -> None:
        for stage in self._stages:
            ray.kill(stage)
        self._stages = []

    def _told(self, asked: Sequence[Any]) -> list[Any]:
        """What the processes answer; MeasureError where one of them has ended, and its own error where that failed."""
        try:
            answers: list[Any] = ray.get(list(asked))
        except ray.exceptions.RayActorError as error:
            ended = [n for n, s in enumerate(self._stages) if s._actor_id.hex() == error.actor_id]
            lost = self.processes[ended[0]] if ended and self.processes else "one of them"
            self._stop()
            raise MeasureError(
                f"of the processes that share the engine one has ended ({lost})",
                location="runtime.processes",
                hint="Ask again: they are started anew",
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return answers


class _Sequence:
    """What was read of one sequence, in all processes."""

    def __init__(self, session: RaySession, stages: Sequence[Any], name: str) -> None:
        self._session, self._stages, self._name = session, tuple(stages), name
        weakref.finalize(self, _forget, self._stages, name).atexit = False

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        values: Any = {}
        for stage in self._stages:
            values = stage.forward.remote(self._name, list(tokens), list(rows), values)
        logits: np.ndarray = self._session._told([values])[0][graph.LOGITS]
        return np.array(logits)

    def rollback(self, count: int) -> None:
        for stage in self._stages:
            stage.rollback.remote(self._name, count)


def _forget(stages: Sequence[Any], name: str) -> None:
    if ray.is_initialized():
        with suppress(ray.exceptions.RayError):
            for stage in stages:
                stage.forget.remote(name)


class _Stage:
    """Consecutive shards in one process, with what they keep of each sequence."""

    def __init__(self, directory: str, runtime: PortableOnnx, threads: int, part: range) -> None:
        self._chain = weight_streaming.chain(Path(directory), runtime, threads, part)
        self._wanted: Collection[str] = ()
        self._sequences: dict[str, Slots] = {}

    def described(self) -> tuple[str, Sequence[str], set[str]]:
        """Where it runs, what computes, and the names of all that its shards read."""
        location = f"process {os.getpid()} on {os.uname().nodename}"
        return location, tuple(self._chain.get_providers()), set().union(*self._chain.entering)

    def pass_on(self, wanted: Collection[str]) -> None:
        """Give later processes the values of these names."""
        self._wanted = wanted

    def begin(self, name: str, room: Room, factors: Values) -> None:
        passed = sorted({value for names in self._chain.leaving for value in names} & set(self._wanted))
        self._sequences[name] = Slots(self._chain, room, factors, "cpu", self._chain.allocate, passed=passed)

    def forward(self, name: str, tokens: Sequence[int], rows: Sequence[int], crossing: Values) -> dict[str, np.ndarray]:
        """What these shards and those before them computed that is still needed; the last ones give the logits."""
        on = {value: array for value, array in crossing.items() if value in self._wanted}
        return on | self._sequences[name].step(tokens, rows, crossing)

    def rollback(self, name: str, count: int) -> None:
        self._sequences[name].rollback(count)

    def forget(self, name: str) -> None:
        self._sequences.pop(name, None)
