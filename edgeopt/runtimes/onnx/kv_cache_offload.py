"""Buffers of keys and values: all in memory, or some of them in a mapped file.

What lies in a file is as exact as what lies in memory. A shard's part of it is read ahead while the shard before it
computes, and given back once the shard itself has; the kernel keeps the pages for as long as it has room for them.
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

Shapes = Mapping[str, tuple[tuple[int, ...], type]]
"""Shape and type of each buffer by its name."""
Allocate = Callable[[Shapes], Mapping[str, np.ndarray]]
"""Buffers full of zeros."""


def select_resident(sizes: Sequence[int], budget_bytes: int) -> set[int]:
    """Places of the first sizes that fit the budget together."""
    found: set[int] = set()
    for index, size in enumerate(sizes):
        if size <= budget_bytes:
            found.add(index)
            budget_bytes -= size
    return found


def in_memory(shapes: Shapes) -> dict[str, np.ndarray]:
    return {name: np.zeros(*form) for name, form in shapes.items()}


class Spill:
    """Buffers of which those of the first shards stay in memory, as many as fit the budget together.

    The last tokens, which are kept as they are beside codes, stay in memory with them.

    Args:
        read: names of what each shard reads.
    """

    def __init__(self, read: Sequence[Collection[str]], budget_bytes: int) -> None:
        self._read, self._budget_bytes = read, budget_bytes
        self._mapped: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()

    def allocate(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """Raises BuildError where the file system has no room for a file of their size."""
        recent = {name for name in shapes if name.endswith(graph.RECENT_SUFFIX)}
        budget_bytes = self._budget_bytes - sum(_bytes(*shapes[name]) for name in recent)
        owned = [[name for name in names if name in shapes.keys() - recent] for names in self._read]
        stay = select_resident([sum(_bytes(*shapes[name]) for name in names) for names in owned], budget_bytes)
        kept = recent.union(*(owned[index] for index in stay))
        found = in_memory({name: form for name, form in shapes.items() if name in kept})
        for name in shapes.keys() - kept:
            found[name] = array = _in_a_file(*shapes[name])
            self._mapped[array.ctypes.data] = array
        return found

    def before(self, number: int, values: Mapping[str, Any]) -> None:
        """Shard `number` is going to compute with ONNX Runtime's `values`: ask for what the next reads of the file."""
        self._advise((number + 1) % len(self._read), values, MADV_WILLNEED)

    def after(self, number: int, values: Mapping[str, Any]) -> None:
        """Shard `number` has computed: give its part of the file back."""
        self._advise(number, values, MADV_DONTNEED)

    def _advise(self, number: int, values: Mapping[str, Any], advice: int) -> None:
        for name in self._read[number] & values.keys():
            array = self._mapped.get(values[name].data_ptr())
            if array is not None:
                madvise(array.ctypes.data, array.nbytes, advice)


def _bytes(shape: tuple[int, ...], kind: type) -> int:
    return int(np.prod(shape)) * np.dtype(kind).itemsize


def _in_a_file(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Zeros in a file that has no name and is gone with them."""
    size = _bytes(shape, kind)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would end the process by SIGBUS
        except OSError as error:
            raise BuildError(
                f"there is no room for {size} bytes of keys and values ({error})",
                location=tempfile.gettempdir(),
                hint="Make room, or set TMPDIR to a folder that has it",
            ) from error
        return np.frombuffer(mmap.mmap(file.fileno(), size), kind).reshape(shape)
