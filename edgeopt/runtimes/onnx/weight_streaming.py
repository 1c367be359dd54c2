"""Run the shards of a graph one after another, and stream the weights that exceed the memory budget.

A model larger than memory is read from storage once per token. With mapped weights the kernel would do so page by page,
at every page fault. Instead, this module can prefetch the next shard while one computes, and it releases each streamed
shard once it has computed, so that the resident shards stay in memory. Sources: madvise(2), posix_fadvise(2).
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
from edgeopt.runtimes.onnx.kv_cache_offload import Allocator, KvOffload, allocate_in_memory, select_resident
from edgeopt.runtimes.onnx.session_options import create_session_options
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


class WeightStream:
    """The mapped weights of all shards, some of which are read from storage for every token.

    Args:
        streamed: indices of those shards.
        read_ahead: prefetch the next streamed shard while a shard computes.
        mapped_weights: when the weights of the other shards come into memory.
    """

    def __init__(
        self,
        file: Path,
        all_shards: Sequence[Shard],
        streamed: Collection[int],
        *,
        read_ahead: bool,
        mapped_weights: MappedWeights = "on_demand",
    ) -> None:
        self._file = os.open(file, os.O_RDONLY)
        self._shards, self._streamed, self._read_ahead = all_shards, sorted(streamed), read_ahead
        mappings = file_mappings(file)
        regions = {index: _shard_regions(mappings, shard.weights) for index, shard in enumerate(all_shards)}
        self._streamed_regions = {index: regions.pop(index) for index in self._streamed}
        make_resident(itertools.chain(*regions.values()), mapped_weights)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._pending: Future[None] | None = None

    def prefetch_after(self, shard: int) -> None:
        """Start to prefetch the streamed shard that follows `shard`, if `read_ahead` is set."""
        if self._read_ahead and self._streamed:
            following = next((index for index in self._streamed if index > shard), self._streamed[0])
            self._pending = self._reader.submit(self._prefetch, following)

    def release(self, shard: int) -> None:
        """Release the weights of `shard` from memory, unless it is the only streamed one and so the next one too."""
        if self._pending is not None:
            self._pending.result()
        if shard in self._streamed_regions and len(self._streamed) > 1:
            for start, length in self._streamed_regions[shard]:
                release_pages(start, length)
            for offset, length in self._shards[shard].weights:
                os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Stop the prefetching thread and close the file."""
        self._reader.shutdown()
        os.close(self._file)

    def _prefetch(self, shard: int) -> None:
        for offset, length in self._shards[shard].weights:
            os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_WILLNEED)


def open_shards(directory: Path, runtime: PortableOnnx, threads: int, selection: range | None = None) -> ShardedSession:
    """Open the shards of the engine in `directory`, or the `selection` of them, with the budgets of `runtime`.

    Raises BuildError if the engine has no shards.
    """
    all_shards = shards.read(directory)
    if not all_shards:
        raise BuildError("the engine was built without shards", hint="Build it with runtime.shards=8")
    selected = all_shards if selection is None else all_shards[selection.start : selection.stop]
    options = create_session_options(runtime, threads, stop_spinning=True)
    sessions = [
        onnxruntime.InferenceSession(shard.graph, options, providers=["CPUExecutionProvider"]) for shard in selected
    ]
    sizes, budget_bytes = [shard.size_bytes for shard in selected], runtime.resident_bytes
    resident = select_resident(sizes, sum(sizes) if budget_bytes is None else budget_bytes)
    file = directory / graph.WEIGHTS_FILE
    apply_memory_options(file, runtime)
    weights = WeightStream(
        file,
        selected,
        set(range(len(selected))) - resident,
        read_ahead=runtime.read_ahead,
        mapped_weights=runtime.mapped_weights,
    )
    return ShardedSession(sessions, weights, runtime.kv_resident_bytes)


class ShardedSession:
    """Sessions of consecutive shards behind the interface of one `onnxruntime.InferenceSession`.

    A value that crosses from a shard to a later one has the same name in both.

    Attributes:
        input_names: input names of each shard.
        output_names: output names of each shard.
        kv_offload: allocates the key-value cache; None without a budget for it.
    """

    def __init__(self, sessions: Sequence[Any], weights: WeightStream, kv_budget_bytes: int | None = None) -> None:
        self.sessions, self.weights = sessions, weights
        self.input_names = [{value.name for value in session.get_inputs()} for session in sessions]
        self.output_names = [[value.name for value in session.get_outputs()] for session in sessions]
        self.kv_offload = None if kv_budget_bytes is None else KvOffload(self.input_names, kv_budget_bytes)
        self._crossing = set().union(*self.input_names) & set().union(*self.output_names)

    @property
    def allocate(self) -> Allocator:
        """Return the allocator of the key-value cache."""
        return allocate_in_memory if self.kv_offload is None else self.kv_offload.allocate

    def get_inputs(self) -> list[Any]:
        """Return the inputs that no shard computes."""
        inputs = {value.name: value for session in self.sessions for value in session.get_inputs()}
        return [value for name, value in inputs.items() if name not in self._crossing]

    def get_outputs(self) -> list[Any]:
        """Return the outputs that no shard reads."""
        outputs = (value for session in self.sessions for value in session.get_outputs())
        return [value for value in outputs if value.name not in self._crossing]

    def get_providers(self) -> list[str]:
        """Return the execution providers, which are the same for all shards."""
        providers: list[str] = self.sessions[0].get_providers()
        return providers

    def close(self) -> None:
        """Release the streamed weights."""
        self.weights.close()

    def io_binding(self) -> ShardedIoBinding:
        """Return an empty binding of inputs and outputs."""
        return ShardedIoBinding(self)

    def run_with_iobinding(self, binding: ShardedIoBinding) -> None:
        """Run all shards in order, passing crossing values from each shard to the later ones."""
        crossing: dict[str, Any] = {}
        for shard, (session, shard_binding) in enumerate(zip(self.sessions, binding.bindings, strict=True)):
            for name in self.input_names[shard] & crossing.keys():
                shard_binding.bind_ortvalue_input(name, crossing[name])
            unbound = [name for name in self.output_names[shard] if name not in binding.bound_outputs]
            for name in unbound:
                shard_binding.bind_output(name)
            self.weights.prefetch_after(shard)
            if self.kv_offload is not None:
                self.kv_offload.prefetch_after(shard, binding.inputs)
            session.run_with_iobinding(shard_binding)
            self.weights.release(shard)
            if self.kv_offload is not None:
                self.kv_offload.release(shard, binding.inputs)
            if unbound:  # get_outputs returns the outputs in the order of binding, these last
                crossing |= zip(unbound, shard_binding.get_outputs()[-len(unbound) :], strict=True)
        binding.set_outputs({**binding.inputs, **crossing})


class ShardedIoBinding:
    """Inputs and outputs of the whole graph, each bound in every shard that has it.

    Attributes:
        bound_outputs: names of the outputs that are written into a given value.
    """

    def __init__(self, session: ShardedSession) -> None:
        self.bindings = [shard_session.io_binding() for shard_session in session.sessions]
        self.bound_outputs: set[str] = set()
        self.inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._session = session

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        """Bind an input of every shard that reads it."""
        self.inputs[name] = value
        for binding, names in zip(self.bindings, self._session.input_names, strict=True):
            if name in names:
                binding.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        """Bind an output to `value`, from which later shards also read it."""
        self.bound_outputs.add(name)
        for binding, names in zip(self.bindings, self._session.output_names, strict=True):
            if name in names:
                binding.bind_ortvalue_output(name, value)
        self.bind_ortvalue_input(name, value)

    def bind_output(self, name: str) -> None:
        """Request an output that `get_outputs` returns, such as a value that shards in other processes read."""
        self._outputs[name] = None

    def get_outputs(self) -> list[Any]:
        """Return the requested outputs in the order of `bind_output`."""
        return list(self._outputs.values())

    def set_outputs(self, values: Mapping[str, Any]) -> None:
        """Store the requested outputs, selected from all `values` of a run."""
        self._outputs = {name: values[name] for name in self._outputs}


def _shard_regions(
    mappings: Sequence[tuple[int, int, int]], weights: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return start address and length of the mapped pages that contain nothing but the given weights.

    Args:
        mappings: start address, offset in the file and length of each mapping.
        weights: offset in the file and length of each tensor.
    """
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    regions = []
    for address, offset, length in mappings:
        for start, size in weights:
            first = max(offset, -(-start // page_bytes) * page_bytes)
            last = min(offset + length, (start + size) // page_bytes * page_bytes)
            if first < last:
                regions.append((address + first - offset, last - first))
    return regions
