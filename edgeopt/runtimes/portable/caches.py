"""How a graph keeps the keys and values of one sequence: in slots that it writes in place, in tensors that it gives
back longer each time, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

from edgeopt.runtimes.portable import graph
from edgeopt.runtimes.portable.tiers import Allocate, in_memory

if TYPE_CHECKING:
    from edgeopt.runtimes.past import Past
    from edgeopt.spec import ModelSpec

_TYPES: Mapping[str, type] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def cache_of(
    session: Any,
    spec: ModelSpec,
    capacity: int,
    factors: Mapping[str, np.ndarray],
    device: str = "cpu",
    allocate: Allocate | None = None,
) -> Past:
    """An empty cache of the kind that the graph of `session` asks for, for `capacity` tokens.

    Buffers lie on `device`, cpu or cuda, or where `allocate` puts them; only graphs that write in place have buffers
    that outlive a call.
    """
    names = {value.name for value in session.get_inputs()}
    if graph.PAST_LENGTH in names:
        return Slots(session, capacity, factors, device, allocate or partial(in_memory, device=device))
    return Growing(session, spec) if any(name.startswith("past") for name in names) else Whole(session)


class Slots:
    """Buffers that the graph gets and gives back at once, so that it writes new tokens to their places in them."""

    def __init__(
        self, session: Any, capacity: int, factors: Mapping[str, np.ndarray], device: str, allocate: Allocate
    ) -> None:
        self._session, self._length, self._device = session, 0, device
        self._factors = {name: OrtValue.ortvalue_from_numpy(array, device) for name, array in factors.items()}
        self._buffers = allocate(
            {
                value.name: ((1, value.shape[1], capacity, value.shape[3]), _TYPES[value.type])
                for value in session.get_inputs()
                if value.name.startswith(graph.PAST)
            }
        )
        self._bound: dict[tuple[int, int], _Bound] = {}

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        shape = len(tokens), len(rows)
        if shape not in self._bound:
            self._bound[shape] = _Bound(self._session, *shape, self._buffers, self._factors, self._device)
        logits = self._bound[shape].run(tokens, self._length, rows)
        self._length += len(tokens)
        return logits


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
    ) -> None:
        self._session, self._binding = session, session.io_binding()
        vocabulary = next(value.shape[-1] for value in session.get_outputs() if value.name == graph.LOGITS)
        self._inputs = {
            graph.TOKENS: OrtValue.ortvalue_from_numpy(np.zeros((1, tokens), np.int64), device),
            graph.PAST_LENGTH: OrtValue.ortvalue_from_numpy(np.zeros((), np.int64), device),
            graph.ROWS: OrtValue.ortvalue_from_numpy(np.zeros(rows, np.int64), device),
        }
        for name, value in {**self._inputs, **factors, **buffers}.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in buffers.items():
            self._binding.bind_ortvalue_output(name.replace(graph.PAST, graph.PRESENT), value)
        self._output = OrtValue.ortvalue_from_numpy(np.empty((1, rows, vocabulary), np.float32), device)
        self._binding.bind_ortvalue_output(graph.LOGITS, self._output)

    def run(self, tokens: Sequence[int], length: int, rows: Sequence[int]) -> np.ndarray:
        given = ([list(tokens)], length, list(rows))
        for value, content in zip(self._inputs.values(), given, strict=True):
            value.update_inplace(np.array(content, np.int64))
        self._session.run_with_iobinding(self._binding)
        found: np.ndarray = self._output.numpy()[0].copy()
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

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        arrays = _given(self._session, tokens, self._length)
        given = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        logits, *present = self._session.run_with_ort_values(_outputs(self._session), {**given, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        self._length += len(tokens)
        return _wanted(logits.numpy(), rows)


class Whole:
    """No cache: every call reads the sequence from its beginning."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._tokens: list[int] = []

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        before = len(self._tokens)
        self._tokens += tokens
        (logits,) = self._session.run(_outputs(self._session)[:1], _given(self._session, self._tokens, 0))
        return _wanted(logits, [before + row for row in rows])


def _given(session: Any, tokens: Sequence[int], start: int) -> dict[str, np.ndarray]:
    """What a foreign graph asks for beside keys and values, of tokens that stand at `start` and behind."""
    end = start + len(tokens)
    known = {
        graph.TOKENS: np.array([list(tokens)]),
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
