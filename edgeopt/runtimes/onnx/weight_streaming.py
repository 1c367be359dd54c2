"""Shards one after another as if they were one graph, with weights read ahead and given back behind.

A model larger than memory is read once for each token. The kernel does so by itself where weights are mapped, but page
by page as they are missed; here the next shard is asked for in one piece while one computes, and what a shard needed
is given back at once, so that what is resident stays. Sources: madvise(2), posix_fadvise(2).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from edgeopt.errors import BuildError
from edgeopt.runtimes.onnx import graph, shards
from edgeopt.runtimes.onnx.kv_cache_offload import Allocate, Spill, in_memory, select_resident
from edgeopt.runtimes.onnx.session_options import options
from edgeopt.runtimes.onnx.shards import Shard
from edgeopt.runtimes.onnxruntime_common.mapped_memory import (
    apply_memory_options,
    file_mappings,
    make_resident,
    release_pages,
)
from edgeopt.runtimes.onnxruntime_common.session_options import MappedWeights

if TYPE_CHECKING:
    from edgeopt.runtimes.onnx.runtime import PortableOnnx


class Weights:
    """The mapped weights of shards, of which some are read from storage whenever they are needed.

    Args:
        streamed: numbers of those shards.
        ahead: whether the next of them is asked for while the one before computes.
        stay: how the weights of the others are held in memory.
    """

    def __init__(
        self,
        file: Path,
        found: Sequence[Shard],
        streamed: Collection[int],
        *,
        ahead: bool,
        stay: MappedWeights = "on_demand",
    ) -> None:
        self._file = os.open(file, os.O_RDONLY)
        self._shards, self._streamed, self._ahead = found, sorted(streamed), ahead
        mapped = file_mappings(file)
        pieces = {number: _within(mapped, shard.weights) for number, shard in enumerate(found)}
        self._mapped = {number: pieces.pop(number) for number in self._streamed}
        make_resident(itertools.chain(*pieces.values()), stay)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._asked: Future[None] | None = None

    def before(self, number: int) -> None:
        """Shard `number` is going to compute: ask for the one that is streamed after it."""
        if self._ahead and self._streamed:
            following = next((n for n in self._streamed if n > number), self._streamed[0])
            self._asked = self._reader.submit(self._read, following)

    def after(self, number: int) -> None:
        """Shard `number` has computed: give back what it read, unless it is what is needed next, too."""
        if self._asked is not None:
            self._asked.result()
        if number in self._mapped and len(self._streamed) > 1:
            for start, length in self._mapped[number]:
                release_pages(start, length)
            for offset, length in self._shards[number].weights:
                os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._reader.shutdown()
        os.close(self._file)

    def _read(self, number: int) -> None:
        for offset, length in self._shards[number].weights:
            os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_WILLNEED)


def chain(directory: Path, runtime: PortableOnnx, threads: int, part: range | None = None) -> Chain:
    """The shards of the engine in `directory`, or a part of them, opened for the budgets of `runtime`."""
    found = shards.read(directory)
    if not found:
        raise BuildError("it was not cut into shards", hint="Build it with runtime.shards=8")
    found = found if part is None else found[part.start : part.stop]
    told = options(runtime, threads, in_turn=True)
    opened = [onnxruntime.InferenceSession(one.graph, told, providers=["CPUExecutionProvider"]) for one in found]
    sizes, budget_bytes = [shard.size_bytes for shard in found], runtime.resident_bytes
    streamed = set(range(len(found))) - select_resident(sizes, sum(sizes) if budget_bytes is None else budget_bytes)
    file = directory / graph.WEIGHTS_FILE
    apply_memory_options(file, runtime)
    weights = Weights(file, found, streamed, ahead=runtime.read_ahead, stay=runtime.mapped_weights)
    return Chain(opened, weights, runtime.kv_resident_bytes)


class Chain:
    """What a session of the whole graph offers, by sessions of its shards.

    Values that cross from one shard to a later one are named alike in both.

    Attributes:
        spill: where keys and values have a budget, what allocates them.
    """

    def __init__(self, sessions: Sequence[Any], weights: Weights, kv_budget_bytes: int | None = None) -> None:
        self.sessions, self.weights = sessions, weights
        self.entering = [{value.name for value in session.get_inputs()} for session in sessions]
        self.spill = None if kv_budget_bytes is None else Spill(self.entering, kv_budget_bytes)
        self.leaving = [[value.name for value in session.get_outputs()] for session in sessions]
        self._crossing = set().union(*self.entering) & set().union(*self.leaving)

    @property
    def allocate(self) -> Allocate:
        return in_memory if self.spill is None else self.spill.allocate

    def get_inputs(self) -> list[Any]:
        found = {value.name: value for session in self.sessions for value in session.get_inputs()}
        return [value for name, value in found.items() if name not in self._crossing]

    def get_outputs(self) -> list[Any]:
        return [v for session in self.sessions for v in session.get_outputs() if v.name not in self._crossing]

    def get_providers(self) -> list[str]:
        providers: list[str] = self.sessions[0].get_providers()
        return providers

    def close(self) -> None:
        self.weights.close()

    def io_binding(self) -> ChainBinding:
        return ChainBinding(self)

    def run_with_iobinding(self, binding: ChainBinding) -> None:
        crossed: dict[str, Any] = {}
        for number, (session, own) in enumerate(zip(self.sessions, binding.bindings, strict=True)):
            for name in self.entering[number] & crossed.keys():
                own.bind_ortvalue_input(name, crossed[name])
            passed = [name for name in self.leaving[number] if name not in binding.given]
            for name in passed:
                own.bind_output(name)
            self.weights.before(number)
            if self.spill is not None:
                self.spill.before(number, binding.inputs)
            session.run_with_iobinding(own)
            self.weights.after(number)
            if self.spill is not None:
                self.spill.after(number, binding.inputs)
            if passed:  # bound last, and given back in the order of binding
                crossed |= zip(passed, own.get_outputs()[-len(passed) :], strict=True)
        binding.keep({**binding.inputs, **crossed})


class ChainBinding:
    """Inputs and outputs of the whole graph, each bound in every shard that has it."""

    def __init__(self, chain: Chain) -> None:
        self.bindings = [session.io_binding() for session in chain.sessions]
        self.given: set[str] = set()
        self.inputs: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._chain = chain

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value
        for binding, names in zip(self.bindings, self._chain.entering, strict=True):
            if name in names:
                binding.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        """Later shards that read such an output read it where it lies."""
        self.given.add(name)
        for binding, names in zip(self.bindings, self._chain.leaving, strict=True):
            if name in names:
                binding.bind_ortvalue_output(name, value)
        self.bind_ortvalue_input(name, value)

    def bind_output(self, name: str) -> None:
        """A value that crosses to shards elsewhere."""
        self._kept[name] = None

    def get_outputs(self) -> list[Any]:
        """What was bound so, in that order."""
        return list(self._kept.values())

    def keep(self, found: Mapping[str, Any]) -> None:
        """Of all that the shards computed, what crosses to others."""
        self._kept = {name: found[name] for name in self._kept}


def _within(mapped: Sequence[tuple[int, int, int]], weights: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start address and length, whole pages, of what the mappings have of the weights and of nothing else."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = []
    for start, offset, length in mapped:
        for start, size in weights:
            first = max(offset, -(-start // page) * page)
            last = min(offset + length, (start + size) // page * page)
            if first < last:
                found.append((start + first - offset, last - first))
    return found
