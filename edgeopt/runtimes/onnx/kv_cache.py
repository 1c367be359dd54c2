"""How a graph keeps the keys and values of one sequence: in slots that it writes in place, in tensors that it gives
back longer each time, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

from edgeopt.errors import BuildError
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.kv_cache_offload import Allocate, in_memory

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.runtimes.decoding.incremental_session import SequenceState

_TYPES: Mapping[str, type] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
SINKS = 4
"""Tokens at the beginning of a text that stay in every window, as attention rests on them (Xiao et al. 2024, "Efficient
streaming language models with attention sinks", arXiv:2309.17453, section 3)."""
RECENT = 128
"""Of the last tokens, how many are kept as they are where keys and values are codes."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the keys and values of a sequence of `length` tokens may take, read `at_once` tokens at a time at most.

    Attributes:
        window: how many of the last tokens are read at least, beside the first ones; None: all.
    """

    length: int
    chunk_tokens: int
    window: int | None = None

    @property
    def slots(self) -> int:
        return self.length if self.window is None else min(self.length, SINKS + self.window + self.chunk_tokens)

    @property
    def recent(self) -> int:
        """The tokens of one reading have all to find room."""
        return min(self.slots, max(self.chunk_tokens, min(RECENT, self.window or RECENT)))


def cache_of(
    session: Any,
    spec: ModelSpec,
    room: Room,
    factors: Mapping[str, np.ndarray],
    device: str = "cpu",
    allocate: Allocate = in_memory,
) -> SequenceState:
    """An empty cache of the kind that the graph of `session` asks for.

    Buffers are arrays of `allocate`, copied to `device` where that is cuda and not cpu; only graphs that write in place
    have buffers that outlive a call. BuildError where another graph is to forget what is out of a window.
    """
    names = {value.name for value in session.get_inputs()}
    if graph.PAST_LENGTH in names:
        return Slots(session, room, factors, device, allocate)
    if room.window is not None:
        raise BuildError(
            "the graph keeps keys and values by itself, and all of them",
            location="runtime.kv_window",
            hint="Leave it out, or build the engine with runtime=onnx",
        )
    return Growing(session, spec) if any(name.startswith("past") for name in names) else Whole(session)


class Slots:
    """Buffers that the graph gets and gives back at once, so that it writes new tokens to their places in them.

    Where they are full, what lies between the first tokens and the window is forgotten. Keys keep the places in the
    text by which they were turned.

    Args:
        passed: names of values beside the logits that are wanted of each reading, by shards that lie elsewhere.
    """

    def __init__(
        self,
        session: Any,
        room: Room,
        factors: Mapping[str, np.ndarray],
        device: str,
        allocate: Allocate,
        passed: Sequence[str] = (),
    ) -> None:
        self._session, self._room, self._device, self._passed = session, room, device, passed
        self._position, self._forgotten = 0, 0
        self._factors = {name: OrtValue.ortvalue_from_numpy(array, device) for name, array in factors.items()}
        self._arrays = allocate(
            {
                value.name: ((1, value.shape[1], self._slots(value.name), value.shape[3]), _TYPES[value.type])
                for value in session.get_inputs()
                if value.name.startswith(graph.PAST_PREFIX)
            }
        )
        self._buffers = {name: OrtValue.ortvalue_from_numpy(array, device) for name, array in self._arrays.items()}
        self._bound: dict[tuple[int, int], _Bound] = {}

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        return self.step(tokens, rows, {})[graph.LOGITS]

    def rollback(self, count: int) -> None:
        self._position -= count

    def step(
        self, tokens: Sequence[int], rows: Sequence[int], crossing: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Read on with what was computed elsewhere: the logits, where they are computed here, and what is passed."""
        if self._position - self._forgotten + len(tokens) > self._room.slots:
            self._forget()
        shape = len(tokens), len(rows)
        if shape not in self._bound:
            self._bound[shape] = _Bound(self._session, *shape, self._buffers, self._factors, self._device, self._passed)
        length = self._position - self._forgotten
        found = self._bound[shape].run(tokens, length, self._position, rows, crossing)
        self._position += len(tokens)
        return found

    def _slots(self, name: str) -> int:
        return self._room.recent if name.endswith(graph.RECENT_SUFFIX) else self._room.slots

    def _forget(self) -> None:
        assert self._room.window is not None  # else there is a slot for each token
        kept = slice(SINKS, SINKS + self._room.window)
        end = self._position - self._forgotten
        for name, array in self._arrays.items():
            if not name.endswith(graph.RECENT_SUFFIX):
                array[:, :, kept] = array[:, :, end - self._room.window : end]
        self._forgotten += end - kept.stop


class _Bound:
    """One shape of a call with all its buffers bound."""

    def __init__(
        self,
        session: Any,
        tokens: int,
        rows: int,
        buffers: Mapping[str, OrtValue],
        factors: Mapping[str, OrtValue],
        device: str,
        passed: Sequence[str],
    ) -> None:
        self._session, self._binding, self._passed = session, session.io_binding(), passed
        self._inputs = {
            graph.INPUT_IDS: OrtValue.ortvalue_from_numpy(np.zeros((1, tokens), np.int64), device),
            graph.PAST_LENGTH: OrtValue.ortvalue_from_numpy(np.zeros((), np.int64), device),
            graph.POSITION: OrtValue.ortvalue_from_numpy(np.zeros((), np.int64), device),
            graph.ROWS: OrtValue.ortvalue_from_numpy(np.zeros(rows, np.int64), device),
        }
        for name, value in {**self._inputs, **factors, **buffers}.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in buffers.items():
            self._binding.bind_ortvalue_output(name.replace(graph.PAST_PREFIX, graph.PRESENT_PREFIX), value)
        found = {value.name: value.shape[-1] for value in session.get_outputs() if value.name == graph.LOGITS}
        self._outputs = {
            name: OrtValue.ortvalue_from_numpy(np.empty((1, rows, vocabulary), np.float32), device)
            for name, vocabulary in found.items()
        }
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        for name in passed:
            self._binding.bind_output(name)

    def run(
        self,
        tokens: Sequence[int],
        length: int,
        position: int,
        rows: Sequence[int],
        crossing: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        given = ([list(tokens)], length, position, list(rows))
        for value, content in zip(self._inputs.values(), given, strict=True):
            value.update_inplace(np.array(content, np.int64))
        for name, array in crossing.items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        self._session.run_with_iobinding(self._binding)
        found = {name: value.numpy()[0].copy() for name, value in self._outputs.items()}
        if self._passed:
            found |= {n: v.numpy() for n, v in zip(self._passed, self._binding.get_outputs(), strict=True)}
        return found


class Growing:
    """Keys and values that the graph hands back with the new tokens behind the old, as most exporters have it."""

    def __init__(self, session: Any, spec: ModelSpec) -> None:
        self._session, self._length = session, 0
        self._past = {
            value.name: OrtValue.ortvalue_from_numpy(_empty(value, spec))
            for value in session.get_inputs()
            if value.name.startswith("past")
        }

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        arrays = _given(self._session, tokens, self._length)
        given = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        logits, *present = self._session.run_with_ort_values(_outputs(self._session), {**given, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        self._length += len(tokens)
        return _wanted(logits.numpy(), rows)

    def rollback(self, count: int) -> None:
        if count:
            self._length -= count
            self._past = {
                name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, : self._length]))
                for name, value in self._past.items()
            }


class Whole:
    """No cache: every call reads the sequence from its beginning."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._tokens: list[int] = []

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        before = len(self._tokens)
        self._tokens += tokens
        (logits,) = self._session.run(_outputs(self._session)[:1], _given(self._session, self._tokens, 0))
        return _wanted(logits, [before + row for row in rows])

    def rollback(self, count: int) -> None:
        del self._tokens[len(self._tokens) - count :]


def _given(session: Any, tokens: Sequence[int], start: int) -> dict[str, np.ndarray]:
    """What a foreign graph asks for beside keys and values, of tokens that stand at `start` and behind."""
    end = start + len(tokens)
    known = {
        graph.INPUT_IDS: np.array([list(tokens)]),
        "attention_mask": np.ones((1, end)),
        "position_ids": np.arange(start, end)[None],
        "cache_position": np.arange(start, end),
        "use_cache_branch": np.array([start > 0]),
    }
    asked = {value.name: value.type for value in session.get_inputs()}
    return {name: array.astype(_TYPES[asked[name]]) for name, array in known.items() if name in asked}


def _outputs(session: Any) -> list[str]:
    """Names of the logits and then of the other outputs in their order."""
    names = [value.name for value in session.get_outputs()]
    logits = graph.LOGITS if graph.LOGITS in names else names[0]
    return [logits, *(name for name in names if name != logits)]


def _wanted(logits: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    found: np.ndarray = logits[0, list(rows)].astype(np.float32)
    return found


def _empty(value: Any, spec: ModelSpec) -> np.ndarray:
    """Keys or values before the first token; sizes that the graph leaves open are the model's."""
    heads, size = (
        given if isinstance(given, int) else known
        for given, known in ((value.shape[1], spec.layers[0].kv_heads), (value.shape[3], spec.head_size))
    )
    return np.zeros((1, heads, 0, size), _TYPES[value.type])
