"""TensorRT engines on their GPU; sequences run one after another, each with keys and values of its own.

Keys and values lie twice, since an engine may write what it gives back before it has read all that it was given: each
call reads the one and writes the other.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeopt.checkpoints import adapters
from edgeopt.checkpoints.tokenizer import end_tokens
from edgeopt.errors import BuildError, MeasureError
from edgeopt.runtimes.decoding.incremental_session import PastSession
from edgeopt.runtimes.onnx.graph import INPUT_IDS, LOGITS, PAST_LENGTH, PAST_PREFIX, POSITION, PRESENT_PREFIX, ROWS
from edgeopt.runtimes.tensorrt import library
from edgeopt.runtimes.tensorrt import plan as plans

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.artifact import Engine
    from edgeopt.runtimes.tensorrt.gpu import Gpu
    from edgeopt.runtimes.tensorrt.identity import BuiltBy
    from edgeopt.runtimes.tensorrt.library import Trt
    from edgeopt.runtimes.tensorrt.runtime import TensorRt

TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32}


class TensorRtSession(PastSession):
    """One engine on its GPU with a context for each optimization profile."""

    def __init__(self, engine: Engine, runtime: TensorRt, built_by: BuiltBy, *, trt: Trt, gpu: Gpu) -> None:
        directory = engine.directory
        built_by.require(directory, tensorrt=str(trt.__version__), gpu=gpu.identity)
        self._spec, self._gpu, self._trt, self._graphs = engine.spec, gpu, trt, runtime.cuda_graphs
        self.computed_by = (gpu.identity.name,)
        self._ends, self._guessed = end_tokens(directory), runtime.prompt_lookup
        profiles = plans.read(directory).profiles
        self._at_once = profiles[plans.PREFILL][INPUT_IDS][2][1]
        self._told: list[str] = []
        self._engine = self._loaded(directory / plans.ENGINE, runtime)
        self._contexts = {name: self._context(number) for number, name in enumerate(profiles)}

    def close(self) -> None:
        self._contexts, self._engine = {}, None

    def _loaded(self, path: Path, runtime: TensorRt) -> Any:
        """The engine, read from its mapped file by TensorRT itself."""
        loader = self._trt.Runtime(library.logger(self._trt, self._told))
        if runtime.version_compatible:
            loader.engine_host_code_allowed = True
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = loader.deserialize_cuda_engine(_reader(self._trt, mapped))
        if engine is None:
            raise BuildError(f"TensorRT cannot load the engine: {'; '.join(self._told)}", location=str(path))
        if runtime.weights_mib:
            engine.weight_streaming_budget_v2 = min(runtime.weights_mib * 2**20, engine.streamable_weights_size)
        return engine

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._gpu.stream):
            raise BuildError(f"TensorRT makes no context of the engine: {'; '.join(self._told)}")
        return context

    def _sequence(self, capacity: int, adapter: str | None) -> _Sequence:
        adapters.require(adapter, self._spec)
        return _Sequence(_Tensors(self._engine, self._gpu, capacity), self._contexts, self._gpu, graphs=self._graphs)


class _Tensors:
    """Buffers for the inputs and outputs of an engine, for one sequence of at most `capacity` tokens."""

    def __init__(self, engine: Any, gpu: Gpu, capacity: int) -> None:
        self._engine, self._gpu, self._capacity = engine, gpu, capacity
        self._names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self._on_host = {name for name in self._names if engine.is_shape_inference_io(name)}

    @property
    def are_on_gpu(self) -> bool:
        """Whether nothing that a call is given decides on shapes, which the host would have to know."""
        return not self._on_host

    def keys_and_values(self) -> dict[str, torch.Tensor]:
        """By the names of the inputs, (1, heads, capacity, head size)."""
        shapes = {name: self._engine.get_tensor_shape(name) for name in self._names if name.startswith(PAST_PREFIX)}
        return {name: self._new(name, (1, shape[1], self._capacity, shape[3])) for name, shape in shapes.items()}

    def given(self, tokens: int, rows: int) -> dict[str, torch.Tensor]:
        """What a call is told beside keys and values."""
        shapes: dict[str, tuple[int, ...]] = {INPUT_IDS: (1, tokens), PAST_LENGTH: (), POSITION: (), ROWS: (rows,)}
        return {name: self._new(name, shape) for name, shape in shapes.items() if name in self._names}

    def logits(self, rows: int) -> torch.Tensor:
        return self._new(LOGITS, (1, rows, self._engine.get_tensor_shape(LOGITS)[2]))

    def _new(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        kind = TYPES[self._engine.get_tensor_dtype(name).name]
        return torch.zeros(shape, dtype=kind, device="cpu" if name in self._on_host else self._gpu.location)


class _Sequence:
    """Keys and values of one sequence, and the buffers of each kind of call."""

    def __init__(self, tensors: _Tensors, contexts: Mapping[str, Any], gpu: Gpu, *, graphs: bool) -> None:
        self._tensors, self._contexts, self._gpu = tensors, contexts, gpu
        self._graphs = graphs and tensors.are_on_gpu
        self._kept = [tensors.keys_and_values() for _ in range(2)]
        self._length, self._turn = 0, 0
        self._calls: dict[tuple[int, int, int], _Call] = {}

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        key = len(tokens), len(rows), self._turn
        if key not in self._calls:
            self._calls[key] = self._call(*key)
        logits = self._calls[key].run(tokens, self._length, rows)
        self._length += len(tokens)
        self._turn = 1 - self._turn
        return logits

    def back(self, count: int) -> None:
        self._length -= count

    def _call(self, tokens: int, rows: int, turn: int) -> _Call:
        inputs = self._tensors.given(tokens, rows) | self._kept[turn]
        after = {name.replace(PAST_PREFIX, PRESENT_PREFIX): buffer for name, buffer in self._kept[1 - turn].items()}
        outputs = after | {LOGITS: self._tensors.logits(rows)}
        self._gpu.wait()
        decoding = tokens == rows == 1
        context = self._contexts[plans.DECODE if decoding else plans.PREFILL]
        return _Call(context, self._gpu, inputs, outputs, graphs=decoding and self._graphs)


class _Call:
    """One shape of a call with all its buffers, queued a second time as a graph of its kernels."""

    def __init__(
        self,
        context: Any,
        gpu: Gpu,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        *,
        graphs: bool,
    ) -> None:
        self._context, self._gpu, self._inputs, self._outputs, self._graphs = context, gpu, inputs, outputs, graphs
        self._runs = 0
        self._again: Callable[[], None] | None = None

    def run(self, tokens: Sequence[int], length: int, rows: Sequence[int]) -> np.ndarray:
        given = {INPUT_IDS: [list(tokens)], PAST_LENGTH: length, POSITION: length, ROWS: list(rows)}
        for name, content in given.items():
            if name in self._inputs:
                self._inputs[name].copy_(torch.tensor(content, dtype=self._inputs[name].dtype))
        if self._again is None and self._graphs and self._runs == 1:
            self._again = self._gpu.captured(self._queue)
        (self._again or self._queue)()
        self._runs += 1
        self._gpu.wait()
        found: np.ndarray = self._outputs[LOGITS][0].float().cpu().numpy()
        return found

    def _queue(self) -> None:
        for name, buffer in self._inputs.items():
            self._context.set_input_shape(name, tuple(buffer.shape))
        for name, buffer in (*self._inputs.items(), *self._outputs.items()):
            self._context.set_tensor_address(name, buffer.data_ptr())
        if not self._context.execute_async_v3(self._gpu.stream):
            raise MeasureError("TensorRT could not run the engine")


def _reader(trt: Trt, mapped: mmap.mmap) -> Any:
    """What TensorRT reads a mapped file by; versions before 10.7 read from its beginning to its end."""
    if not hasattr(trt, "IStreamReaderV2"):

        class Reader(trt.IStreamReader):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamReader.__init__(self)

            def read(self, size: int) -> bytes:
                return mapped.read(size)

        return Reader()

    class ReaderV2(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return mapped.read(num_bytes)

        def seek(self, offset: int, where: Any) -> bool:
            starts = {trt.SeekPosition.SET: 0, trt.SeekPosition.CUR: mapped.tell(), trt.SeekPosition.END: len(mapped)}
            mapped.seek(starts[where] + offset)
            return True

    return ReaderV2()
