"""Hold the key-value cache of one sequence, in the form that the graph requires.

edgeopt's graphs update buffers in place (`StaticCache`). Graphs of other exporters return longer tensors from every
call (`GrowingCache`), or have no cache (`NoCache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

from edgeopt.errors import BuildError
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.kv_cache_offload import Allocator, allocate_in_memory

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.runtimes.decoding.incremental_session import SequenceState

_DTYPES: Mapping[str, type] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
SINK_TOKENS = 4
"""Tokens at the beginning of a text that every window keeps as attention sinks (Xiao et al. 2024, "Efficient streaming
language models with attention sinks", arXiv:2309.17453, section 3)."""
RECENT_TOKENS = 128
"""Most recent tokens whose keys and values a quantized cache also keeps in floating point."""


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """Number of tokens that the cache of one sequence holds.

    Attributes:
        sequence_length: tokens of the whole sequence.
        chunk_tokens: largest count of tokens that one call computes.
        window: smallest count of recent tokens to keep, in addition to the attention sinks; None keeps all tokens.
    """

    sequence_length: int
    chunk_tokens: int
    window: int | None = None

    @property
    def slots(self) -> int:
        """Return the number of tokens in the cache."""
        if self.window is None:
            return self.sequence_length
        return min(self.sequence_length, SINK_TOKENS + self.window + self.chunk_tokens)

    @property
    def recent_slots(self) -> int:
        """Return the size of the ring buffer of a quantized cache, which must hold all tokens of one call."""
        return min(self.slots, max(self.chunk_tokens, min(RECENT_TOKENS, self.window or RECENT_TOKENS)))


def create_cache(
    session: Any,
    spec: ModelSpec,
    capacity: CacheCapacity,
    adapter_factors: Mapping[str, np.ndarray],
    device: str = "cpu",
    allocate: Allocator = allocate_in_memory,
) -> SequenceState:
    """Return an empty cache of the kind that the graph of `session` requires.

    Args:
        adapter_factors: the low-rank factors of the chosen adapter by input name; empty for the base model.
        device: `cpu`, or `cuda` to copy the buffers to the GPU.
        allocate: allocates the buffers of graphs that update them in place. Other graphs return new tensors.

    Raises BuildError if a window is set and the graph cannot drop tokens.
    """
    names = {value.name for value in session.get_inputs()}
    if graph.PAST_LENGTH in names:
        return StaticCache(session, capacity, adapter_factors, device, allocate)
    if capacity.window is not None:
        raise BuildError(
            "`kv_window` requires a graph that edgeopt exported, because other graphs keep all keys and values",
            location="runtime.kv_window",
            hint="Use null, or build the engine with runtime=onnx",
        )
    return GrowingCache(session, spec) if any(name.startswith("past") for name in names) else NoCache(session)


class StaticCache:
    """Buffers of fixed capacity, bound as inputs and outputs, so that the graph writes new tokens in place.

    When they are full, the tokens between the attention sinks and the window are dropped. The rotary embedding of the
    remaining keys keeps their original positions.

    Args:
        output_names: outputs in addition to the logits, which shards in other processes read.
    """

    def __init__(
        self,
        session: Any,
        capacity: CacheCapacity,
        adapter_factors: Mapping[str, np.ndarray],
        device: str,
        allocate: Allocator,
        output_names: Sequence[str] = (),
    ) -> None:
        self._session, self._capacity, self._device, self._output_names = session, capacity, device, output_names
        self._position, self._dropped_tokens = 0, 0
        self._factors = {name: OrtValue.ortvalue_from_numpy(array, device) for name, array in adapter_factors.items()}
        self._arrays = allocate(
            {
                value.name: ((1, value.shape[1], self._slots(value.name), value.shape[3]), _DTYPES[value.type])
                for value in session.get_inputs()
                if value.name.startswith(graph.PAST_PREFIX)
            }
        )
        self._buffers = {name: OrtValue.ortvalue_from_numpy(array, device) for name, array in self._arrays.items()}
        self._calls: dict[tuple[int, int], _BoundCall] = {}

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        return self.run(tokens, rows, {})[graph.LOGITS]

    def rollback(self, count: int) -> None:
        self._position -= count

    def run(
        self, tokens: Sequence[int], rows: Sequence[int], received: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Append `tokens` and return `output_names`, and the logits if this session computes them.

        Args:
            received: values computed by shards in other processes, by name.
        """
        if self._position - self._dropped_tokens + len(tokens) > self._capacity.slots:
            self._drop_tokens()
        shape = len(tokens), len(rows)
        if shape not in self._calls:
            self._calls[shape] = _BoundCall(
                self._session, *shape, self._buffers, self._factors, self._device, self._output_names
            )
        length = self._position - self._dropped_tokens
        outputs = self._calls[shape].run(tokens, length, self._position, rows, received)
        self._position += len(tokens)
        return outputs

    def _slots(self, name: str) -> int:
        return self._capacity.recent_slots if name.endswith(graph.RECENT_SUFFIX) else self._capacity.slots

    def _drop_tokens(self) -> None:
        """Move the window behind the attention sinks, over the tokens in between."""
        window = self._capacity.window
        assert window is not None  # without a window the cache has a slot for every token
        target = slice(SINK_TOKENS, SINK_TOKENS + window)
        length = self._position - self._dropped_tokens
        for name, array in self._arrays.items():
            if not name.endswith(graph.RECENT_SUFFIX):
                array[:, :, target] = array[:, :, length - window : length]
        self._dropped_tokens += length - target.stop


class _BoundCall:
    """A call with fixed numbers of tokens and rows, whose inputs and outputs are bound once."""

    def __init__(
        self,
        session: Any,
        tokens: int,
        rows: int,
        buffers: Mapping[str, OrtValue],
        factors: Mapping[str, OrtValue],
        device: str,
        output_names: Sequence[str],
    ) -> None:
        self._session, self._binding, self._output_names = session, session.io_binding(), output_names
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
        logits_sizes = {value.name: value.shape[-1] for value in session.get_outputs() if value.name == graph.LOGITS}
        self._logits = {
            name: OrtValue.ortvalue_from_numpy(np.empty((1, rows, vocabulary), np.float32), device)
            for name, vocabulary in logits_sizes.items()
        }
        for name, value in self._logits.items():
            self._binding.bind_ortvalue_output(name, value)
        for name in output_names:
            self._binding.bind_output(name)

    def run(
        self,
        tokens: Sequence[int],
        length: int,
        position: int,
        rows: Sequence[int],
        received: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Run the graph once and return copies of its outputs."""
        contents = ([list(tokens)], length, position, list(rows))
        for value, content in zip(self._inputs.values(), contents, strict=True):
            value.update_inplace(np.array(content, np.int64))
        for name, array in received.items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        self._session.run_with_iobinding(self._binding)
        outputs = {name: value.numpy()[0].copy() for name, value in self._logits.items()}
        if self._output_names:
            computed = zip(self._output_names, self._binding.get_outputs(), strict=True)
            outputs |= {name: value.numpy() for name, value in computed}
        return outputs


class GrowingCache:
    """Keys and values that the graph returns with the new tokens appended, as most exporters do."""

    def __init__(self, session: Any, spec: ModelSpec) -> None:
        self._session, self._length = session, 0
        self._past = {
            value.name: OrtValue.ortvalue_from_numpy(_empty_past(value, spec))
            for value in session.get_inputs()
            if value.name.startswith("past")
        }

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        arrays = _token_inputs(self._session, tokens, self._length)
        inputs = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        logits, *present = self._session.run_with_ort_values(_output_names(self._session), {**inputs, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        self._length += len(tokens)
        return _select_rows(logits.numpy(), rows)

    def rollback(self, count: int) -> None:
        if count:
            self._length -= count
            self._past = {
                name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, : self._length]))
                for name, value in self._past.items()
            }


class NoCache:
    """A graph without a cache: every call computes the sequence from its beginning."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._tokens: list[int] = []

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        start = len(self._tokens)
        self._tokens += tokens
        inputs = _token_inputs(self._session, self._tokens, 0)
        (logits,) = self._session.run(_output_names(self._session)[:1], inputs)
        return _select_rows(logits, [start + row for row in rows])

    def rollback(self, count: int) -> None:
        del self._tokens[len(self._tokens) - count :]


def _token_inputs(session: Any, tokens: Sequence[int], start: int) -> dict[str, np.ndarray]:
    """Return the inputs of another exporter's graph, except keys and values, for tokens from position `start` on."""
    end = start + len(tokens)
    arrays = {
        graph.INPUT_IDS: np.array([list(tokens)]),
        "attention_mask": np.ones((1, end)),
        "position_ids": np.arange(start, end)[None],
        "cache_position": np.arange(start, end),
        "use_cache_branch": np.array([start > 0]),
    }
    types = {value.name: value.type for value in session.get_inputs()}
    return {name: array.astype(_DTYPES[types[name]]) for name, array in arrays.items() if name in types}


def _output_names(session: Any) -> list[str]:
    """Return the name of the logits, followed by the other outputs in order."""
    names = [value.name for value in session.get_outputs()]
    logits = graph.LOGITS if graph.LOGITS in names else names[0]
    return [logits, *(name for name in names if name != logits)]


def _select_rows(logits: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    selected: np.ndarray = logits[0, list(rows)].astype(np.float32)
    return selected


def _empty_past(value: Any, spec: ModelSpec) -> np.ndarray:
    """Return keys or values of zero tokens. Sizes that the graph leaves dynamic are taken from the model."""
    heads, head_size = (
        size if isinstance(size, int) else default
        for size, default in ((value.shape[1], spec.layers[0].kv_heads), (value.shape[3], spec.head_size))
    )
    return np.zeros((1, heads, 0, head_size), _DTYPES[value.type])
