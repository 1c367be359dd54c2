"""Run TensorRT engines on their GPU, one sequence at a time, each with its own KV cache.

Each sequence holds two copies of its KV cache. A TensorRT engine may write outputs before it has read all inputs, so
each call reads one copy and writes the other.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeopt.checkpoints import adapters
from edgeopt.checkpoints.tokenizer import eos_token_ids
from edgeopt.errors import BuildError, MeasureError
from edgeopt.runtimes.decoding.incremental_session import IncrementalSession
from edgeopt.runtimes.onnx.graph import INPUT_IDS, LOGITS, PAST_LENGTH, PAST_PREFIX, POSITION, PRESENT_PREFIX, ROWS
from edgeopt.runtimes.tensorrt import library
from edgeopt.runtimes.tensorrt import plan as plans

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.artifact import Engine
    from edgeopt.runtimes.tensorrt.engine_identity import EngineIdentity
    from edgeopt.runtimes.tensorrt.gpu import Gpu
    from edgeopt.runtimes.tensorrt.library import TensorRtModule
    from edgeopt.runtimes.tensorrt.runtime import TensorRt

DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32}
"""PyTorch data types by the names of TensorRT's."""


class TensorRtSession(IncrementalSession):
    """An engine on its GPU, with one execution context for each optimization profile."""

    def __init__(
        self, engine: Engine, runtime: TensorRt, identity: EngineIdentity, *, trt: TensorRtModule, gpu: Gpu
    ) -> None:
        directory = engine.directory
        identity.require_loadable(directory, tensorrt=str(trt.__version__), gpu=gpu.identity)
        self._spec, self._gpu, self._trt, self._cuda_graphs = engine.spec, gpu, trt, runtime.cuda_graphs
        self.backends = (gpu.identity.name,)
        self._eos_token_ids, self._draft_tokens = eos_token_ids(directory), runtime.prompt_lookup
        profiles = plans.read(directory).profiles
        _, _, max_tokens_shape = profiles[plans.PREFILL][INPUT_IDS]
        self._chunk_tokens = max_tokens_shape[1]
        self._log_messages: list[str] = []
        self._engine = self._load_engine(directory / plans.ENGINE_FILE, runtime)
        self._contexts = {name: self._create_context(index) for index, name in enumerate(profiles)}

    def close(self) -> None:
        self._contexts, self._engine = {}, None

    def _load_engine(self, path: Path, runtime: TensorRt) -> Any:
        """Deserialize the engine; TensorRT reads it from the memory-mapped file without a copy in Python."""
        loader = self._trt.Runtime(library.make_logger(self._trt, self._log_messages))
        if runtime.version_compatible:
            loader.engine_host_code_allowed = True
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = loader.deserialize_cuda_engine(_stream_reader(self._trt, mapped))
        if engine is None:
            raise BuildError(f"TensorRT failed to load the engine: {'; '.join(self._log_messages)}", location=str(path))
        if runtime.weights_mib:
            engine.weight_streaming_budget_v2 = min(runtime.weights_mib * 2**20, engine.streamable_weights_size)
        return engine

    def _create_context(self, profile_index: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile_index, self._gpu.stream):
            raise BuildError(f"TensorRT failed to create an execution context: {'; '.join(self._log_messages)}")
        return context

    def _new_sequence(self, capacity: int, adapter: str | None) -> _Sequence:
        adapters.require(adapter, self._spec)
        allocator = _BufferAllocator(self._engine, self._gpu, capacity)
        return _Sequence(allocator, self._contexts, self._gpu, cuda_graphs=self._cuda_graphs)


class _BufferAllocator:
    """Allocate the input and output buffers of an engine, for one sequence of up to `capacity` tokens."""

    def __init__(self, engine: Any, gpu: Gpu, capacity: int) -> None:
        self._engine, self._gpu, self._capacity = engine, gpu, capacity
        self._names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._host_names = {name for name in self._names if engine.is_shape_inference_io(name)}

    @property
    def has_only_gpu_buffers(self) -> bool:
        """Return whether all buffers are in GPU memory.

        TensorRT reads inputs that determine shapes on the host, which prevents CUDA graphs.
        """
        return not self._host_names

    def kv_cache(self) -> dict[str, torch.Tensor]:
        """Return keys and values by input name, each of shape (1, heads, capacity, head size)."""
        shapes = {name: self._engine.get_tensor_shape(name) for name in self._names if name.startswith(PAST_PREFIX)}
        return {name: self._zeros(name, (1, shape[1], self._capacity, shape[3])) for name, shape in shapes.items()}

    def token_inputs(self, tokens: int, rows: int) -> dict[str, torch.Tensor]:
        """Return the inputs other than the KV cache, for `tokens` new tokens with logits at `rows` of them."""
        shapes: dict[str, tuple[int, ...]] = {INPUT_IDS: (1, tokens), PAST_LENGTH: (), POSITION: (), ROWS: (rows,)}
        return {name: self._zeros(name, shape) for name, shape in shapes.items() if name in self._names}

    def logits(self, rows: int) -> torch.Tensor:
        """Return the output buffer of the logits, shape (1, rows, vocabulary)."""
        return self._zeros(LOGITS, (1, rows, self._engine.get_tensor_shape(LOGITS)[2]))

    def _zeros(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
        return torch.zeros(shape, dtype=dtype, device="cpu" if name in self._host_names else self._gpu.device)


class _Sequence:
    """The KV cache of one sequence, and the calls with their buffers, one for each shape of inputs."""

    def __init__(
        self, allocator: _BufferAllocator, contexts: Mapping[str, Any], gpu: Gpu, *, cuda_graphs: bool
    ) -> None:
        self._allocator, self._contexts, self._gpu = allocator, contexts, gpu
        self._cuda_graphs = cuda_graphs and allocator.has_only_gpu_buffers
        self._kv_caches = [allocator.kv_cache() for _ in range(2)]
        self._length, self._current = 0, 0
        self._calls: dict[tuple[int, int, int], _Call] = {}

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        key = len(tokens), len(rows), self._current
        if key not in self._calls:
            self._calls[key] = self._create_call(*key)
        logits = self._calls[key].run(tokens, self._length, rows)
        self._length += len(tokens)
        self._current = 1 - self._current
        return logits

    def rollback(self, count: int) -> None:
        self._length -= count

    def _create_call(self, tokens: int, rows: int, current: int) -> _Call:
        """Create a call that reads the KV cache at index `current` and writes the other."""
        inputs = self._allocator.token_inputs(tokens, rows) | self._kv_caches[current]
        written = self._kv_caches[1 - current]
        present = {name.replace(PAST_PREFIX, PRESENT_PREFIX): buffer for name, buffer in written.items()}
        outputs = present | {LOGITS: self._allocator.logits(rows)}
        self._gpu.synchronize()
        is_decode = tokens == rows == 1
        context = self._contexts[plans.DECODE if is_decode else plans.PREFILL]
        return _Call(context, self._gpu, inputs, outputs, cuda_graph=is_decode and self._cuda_graphs)


class _Call:
    """One execution with fixed shapes and buffers. The second run captures a CUDA graph, later runs replay it."""

    def __init__(
        self,
        context: Any,
        gpu: Gpu,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        *,
        cuda_graph: bool,
    ) -> None:
        self._context, self._gpu, self._inputs, self._outputs = context, gpu, inputs, outputs
        self._cuda_graph = cuda_graph
        self._run_count = 0
        self._replay: Callable[[], None] | None = None

    def run(self, tokens: Sequence[int], length: int, rows: Sequence[int]) -> np.ndarray:
        """Compute `tokens` after a cache of `length` tokens. Return float32 logits of shape (rows, vocabulary)."""
        values = {INPUT_IDS: [list(tokens)], PAST_LENGTH: length, POSITION: length, ROWS: list(rows)}
        for name, value in values.items():
            if name in self._inputs:
                self._inputs[name].copy_(torch.tensor(value, dtype=self._inputs[name].dtype))
        if self._replay is None and self._cuda_graph and self._run_count == 1:
            self._replay = self._gpu.capture_graph(self._launch)
        (self._replay or self._launch)()
        self._run_count += 1
        self._gpu.synchronize()
        logits: np.ndarray = self._outputs[LOGITS][0].float().cpu().numpy()
        return logits

    def _launch(self) -> None:
        for name, buffer in self._inputs.items():
            self._context.set_input_shape(name, tuple(buffer.shape))
        for name, buffer in (*self._inputs.items(), *self._outputs.items()):
            self._context.set_tensor_address(name, buffer.data_ptr())
        if not self._context.execute_async_v3(self._gpu.stream):
            raise MeasureError("TensorRT failed to execute the engine")


def _stream_reader(trt: TensorRtModule, mapped: mmap.mmap) -> Any:
    """Return a TensorRT stream reader of the mapped file. TensorRT before 10.7 only reads sequentially."""
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
            origins = {trt.SeekPosition.SET: 0, trt.SeekPosition.CUR: mapped.tell(), trt.SeekPosition.END: len(mapped)}
            mapped.seek(origins[where] + offset)
            return True

    return ReaderV2()
