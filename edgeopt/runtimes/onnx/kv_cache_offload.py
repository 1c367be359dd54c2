"""Allocate the buffers of the key-value cache in memory, or partly in a mapped file.

Offloading is exact. While a shard computes, the next shard's part of the file is prefetched; after a shard has
computed, its own part is released. The kernel still keeps released pages for as long as memory is free.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from edgeopt.errors import BuildError
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnxruntime_common.mapped_memory import MADV_DONTNEED, MADV_WILLNEED, madvise

BufferShapes = Mapping[str, tuple[tuple[int, ...], type]]
"""Shape and dtype of each buffer, by name."""
Allocator = Callable[[BufferShapes], Mapping[str, np.ndarray]]
"""Returns zero-filled buffers."""


def select_resident(sizes: Sequence[int], budget_bytes: int) -> set[int]:
    """Return the indices of the shards that stay in memory: in order, each one that still fits the budget."""
    resident: set[int] = set()
    for index, size in enumerate(sizes):
        if size <= budget_bytes:
            resident.add(index)
            budget_bytes -= size
    return resident


def allocate_in_memory(shapes: BufferShapes) -> dict[str, np.ndarray]:
    """Return zero-filled buffers in memory."""
    return {name: np.zeros(*shape_and_dtype) for name, shape_and_dtype in shapes.items()}


class KvOffload:
    """An allocator that keeps the buffers of some shards in memory and maps the others from a file.

    The first shards whose buffers fit the budget stay in memory. So do the recent tokens of a quantized cache.

    Args:
        shard_inputs: input names of each shard.
    """

    def __init__(self, shard_inputs: Sequence[Collection[str]], budget_bytes: int) -> None:
        self._shard_inputs, self._budget_bytes = shard_inputs, budget_bytes
        self._mapped: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()

    def allocate(self, shapes: BufferShapes) -> dict[str, np.ndarray]:
        """Return zero-filled buffers. Raises BuildError if the disk has no space for the file."""
        recent = {name for name in shapes if name.endswith(graph.RECENT_SUFFIX)}
        budget_bytes = self._budget_bytes - sum(_buffer_bytes(*shapes[name]) for name in recent)
        offloadable = [[name for name in names if name in shapes.keys() - recent] for names in self._shard_inputs]
        sizes = [sum(_buffer_bytes(*shapes[name]) for name in names) for names in offloadable]
        resident = recent.union(*(offloadable[index] for index in select_resident(sizes, budget_bytes)))
        buffers = allocate_in_memory({name: value for name, value in shapes.items() if name in resident})
        for name in shapes.keys() - resident:
            buffers[name] = array = _map_temporary_file(*shapes[name])
            self._mapped[array.ctypes.data] = array
        return buffers

    def prefetch_after(self, shard: int, values: Mapping[str, Any]) -> None:
        """Prefetch the mapped buffers of the shard that follows `shard`.

        Args:
            values: the OrtValues bound to the shards' inputs, by name.
        """
        self._advise((shard + 1) % len(self._shard_inputs), values, MADV_WILLNEED)

    def release(self, shard: int, values: Mapping[str, Any]) -> None:
        """Release the mapped buffers of `shard` from memory; their content stays in the file."""
        self._advise(shard, values, MADV_DONTNEED)

    def _advise(self, shard: int, values: Mapping[str, Any], advice: int) -> None:
        for name in self._shard_inputs[shard] & values.keys():
            array = self._mapped.get(values[name].data_ptr())
            if array is not None:
                madvise(array.ctypes.data, array.nbytes, advice)


def _buffer_bytes(shape: tuple[int, ...], dtype: type) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _map_temporary_file(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return a zero-filled array mapped from an unnamed file, which is deleted with the array."""
    size = _buffer_bytes(shape, dtype)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # without it a full disk ends the process with SIGBUS
        except OSError as error:
            raise BuildError(
                f"the disk has no space for {size} bytes of keys and values ({error})",
                location=tempfile.gettempdir(),
                hint="Free disk space, or set TMPDIR to a folder with enough space",
            ) from error
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype).reshape(shape)
