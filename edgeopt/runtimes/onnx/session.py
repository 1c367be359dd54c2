"""Portable engines in memory, and foreign ONNX graphs that keep their keys and values in the usual ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from edgeopt.checkpoints import adapters
from edgeopt.checkpoints.tokenizer import eos_token_ids
from edgeopt.errors import BuildError
from edgeopt.runtimes.decoding.chunked_prefill import resolve_chunk_tokens
from edgeopt.runtimes.decoding.incremental_session import IncrementalSession, SequenceState
from edgeopt.runtimes.onnx import graph, weight_streaming
from edgeopt.runtimes.onnx.kv_cache import Room, cache_of
from edgeopt.runtimes.onnx.kv_cache_offload import in_memory
from edgeopt.runtimes.onnx.session_options import options
from edgeopt.runtimes.onnxruntime_common import thread_affinity
from edgeopt.runtimes.onnxruntime_common.mapped_memory import apply_memory_options, make_resident, mapped_regions

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.runtimes.onnx.runtime import PortableOnnx

CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": ("CUDAExecutionProvider", CPU),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU),
}
"""By name: what is tried first, and what takes the operators that it has not."""


class PortableSession(IncrementalSession):
    """One graph in memory; sequences run one after another, each with a cache of its own."""

    def __init__(self, runtime: PortableOnnx, engine: Engine, threads: int) -> None:
        self._spec, self._directory = engine.spec, engine.directory
        self._end_tokens = eos_token_ids(engine.directory)
        self._window, self._draft_tokens = runtime.kv_window, runtime.prompt_lookup
        self._chunk_tokens = resolve_chunk_tokens(engine.directory, engine.spec, runtime.prompt_tokens)
        self._pin_thread = thread_affinity.pin_calling_thread(runtime.cpu_ids(threads))
        here = onnxruntime.get_available_providers()
        providers = [name for name in PROVIDERS[runtime.provider] if name in here]
        try:
            self._session: Any = (
                weight_streaming.chain(engine.directory, runtime, threads)
                if runtime.parted
                else onnxruntime.InferenceSession(
                    engine.directory / graph.GRAPH_FILE, options(runtime, threads), providers=providers
                )
            )
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            raise BuildError(f"the engine cannot be opened ({error})", location=str(engine.directory)) from error
        if not runtime.parted:
            apply_memory_options(engine.directory / graph.WEIGHTS_FILE, runtime)
            make_resident(mapped_regions(engine.directory / graph.WEIGHTS_FILE), runtime.mapped_weights)
        self.backends = tuple(self._session.get_providers())
        self._device = "cpu" if self.backends[0] == CPU else "cuda"
        if self.backends[0] != PROVIDERS[runtime.provider][0] and not runtime.cpu_fallback:
            raise BuildError(
                f"ONNX Runtime has no {runtime.provider} here, and {self.backends[0]} would take its place",
                location="runtime.provider",
                hint="Install a GPU build of ONNX Runtime and its libraries, or allow runtime.cpu_fallback=true",
            )

    def close(self) -> None:
        if isinstance(self._session, weight_streaming.Chain):
            self._session.close()
        self._session = None

    def _new_sequence(self, length: int, adapter: str | None) -> SequenceState:
        room = Room(length, self._chunk_tokens, self._window)
        allocate = self._session.allocate if isinstance(self._session, weight_streaming.Chain) else in_memory
        past = cache_of(self._session, self._spec, room, self._factors(adapter), self._device, allocate)
        return thread_affinity.PinnedState(past, self._pin_thread)

    def _factors(self, adapter: str | None) -> Mapping[str, np.ndarray]:
        """The inputs by which the graph computes with an adapter."""
        adapters.require(adapter, self._spec)
        return adapters.arrays(self._directory, adapter) if adapter else {}
