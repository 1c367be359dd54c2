"""Open portable engines, and graphs of other exporters, in this process."""

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
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.kv_cache import CacheCapacity, create_cache
from edgeopt.runtimes.onnx.kv_cache_offload import allocate_in_memory
from edgeopt.runtimes.onnx.session_options import create_session_options
from edgeopt.runtimes.onnx.weight_streaming import ShardedSession, open_shards
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
"""Execution providers in order of preference. A later one computes the operators that an earlier one lacks."""


class PortableSession(IncrementalSession):
    """One engine in this process. Each sequence has a cache of its own."""

    def __init__(self, runtime: PortableOnnx, engine: Engine, threads: int) -> None:
        self._spec, self._directory = engine.spec, engine.directory
        self._eos_token_ids = eos_token_ids(engine.directory)
        self._window, self._draft_tokens = runtime.kv_window, runtime.prompt_lookup
        self._chunk_tokens = resolve_chunk_tokens(engine.directory, engine.spec, runtime.prompt_tokens)
        self._pin_thread = thread_affinity.pin_calling_thread(runtime.cpu_ids(threads))
        available = onnxruntime.get_available_providers()
        providers = [name for name in PROVIDERS[runtime.provider] if name in available]
        try:
            self._session: Any = (
                open_shards(engine.directory, runtime, threads)
                if runtime.runs_shards
                else onnxruntime.InferenceSession(
                    engine.directory / graph.GRAPH_FILE,
                    create_session_options(runtime, threads),
                    providers=providers,
                )
            )
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise BuildError(f"the engine cannot be opened ({error})", location=str(engine.directory)) from error
        if not runtime.runs_shards:
            apply_memory_options(engine.directory / graph.WEIGHTS_FILE, runtime)
            make_resident(mapped_regions(engine.directory / graph.WEIGHTS_FILE), runtime.mapped_weights)
        self.backends = tuple(self._session.get_providers())
        self._device = "cpu" if self.backends[0] == CPU else "cuda"
        if self.backends[0] != PROVIDERS[runtime.provider][0] and not runtime.cpu_fallback:
            raise BuildError(
                f"`provider` {runtime.provider} is not available on this machine; {self.backends[0]} is",
                location="runtime.provider",
                hint="Install a GPU build of ONNX Runtime and its libraries, or set runtime.cpu_fallback=true",
            )

    def close(self) -> None:
        if isinstance(self._session, ShardedSession):
            self._session.close()
        self._session = None

    def _new_sequence(self, length: int, adapter: str | None) -> SequenceState:
        capacity = CacheCapacity(length, self._chunk_tokens, self._window)
        allocate = self._session.allocate if isinstance(self._session, ShardedSession) else allocate_in_memory
        factors = self._adapter_factors(adapter)
        cache = create_cache(self._session, self._spec, capacity, factors, self._device, allocate)
        return thread_affinity.PinnedState(cache, self._pin_thread)

    def _adapter_factors(self, adapter: str | None) -> Mapping[str, np.ndarray]:
        """Return the low-rank factors of an adapter by input name; empty for the base model."""
        adapters.require(adapter, self._spec)
        return adapters.read_arrays(self._directory, adapter) if adapter else {}
