"""Run GGUF engines through llama.cpp's C interface."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from edgeopt.checkpoints import adapters
from edgeopt.checkpoints.tokenizer import eos_token_ids
from edgeopt.errors import BuildError, MeasureError
from edgeopt.runtimes.decoding.incremental_session import IncrementalSession
from edgeopt.runtimes.llamacpp import library
from edgeopt.runtimes.llamacpp.layout import MODEL_FILE, adapter_path

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.runtimes.llamacpp.runtime import LlamaCpp

KV_CACHE_TYPES = {
    "fp32": llama_cpp.GGML_TYPE_F32,
    "fp16": llama_cpp.GGML_TYPE_F16,
    "int8": llama_cpp.GGML_TYPE_Q8_0,
    "int4": llama_cpp.GGML_TYPE_Q4_0,
}


class LlamaCppSession(IncrementalSession):
    """A loaded model. Sequences run one after another, each in its own llama.cpp context."""

    backends = ("CPU",)

    def __init__(self, runtime: LlamaCpp, engine: Engine, threads: int) -> None:
        library.silence()
        self._runtime, self._spec, self._threads = runtime, engine.spec, threads
        self._directory, self._eos_token_ids = engine.directory, eos_token_ids(engine.directory)
        self._chunk_tokens, self._draft_tokens = runtime.prompt_tokens, runtime.prompt_lookup
        self._adapters: dict[str, Any] = {}
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if runtime.mapped else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = runtime.repacked
        self._model = llama_cpp.llama_model_load_from_file(bytes(engine.directory / MODEL_FILE), params)
        if self._model is None:
            raise BuildError(
                "llama.cpp failed to load the engine", location=str(engine.directory), hint="Build the engine again"
            )

    def close(self) -> None:
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
        self._model, self._adapters = None, {}

    def _new_sequence(self, length: int, adapter: str | None) -> _Context:
        adapters.require(adapter, self._spec)
        context = _Context(self._model, self._runtime, length, self._threads, self._spec.vocabulary_size)
        if adapter is not None:
            context.activate(self._load_adapter(adapter))
        return context

    def _load_adapter(self, name: str) -> Any:
        """Return an adapter, loaded at its first use. llama.cpp frees it together with the model."""
        if name not in self._adapters:
            path = self._directory / adapter_path(name)
            self._adapters[name] = llama_cpp.llama_adapter_lora_init(self._model, bytes(path))
            if self._adapters[name] is None:
                raise BuildError(
                    "llama.cpp failed to load the adapter", location=str(path), hint="Build the engine again"
                )
        return self._adapters[name]


class _Context:
    """The KV cache of one sequence. llama.cpp's memory is freed when this object is collected."""

    def __init__(self, model: Any, runtime: LlamaCpp, capacity: int, threads: int, vocabulary_size: int) -> None:
        self._length, self._vocabulary_size = 0, vocabulary_size
        batch_size = min(runtime.prompt_tokens, capacity)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = capacity
        params.n_batch = params.n_ubatch = batch_size
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_CACHE_TYPES[runtime.keys_values]
        if runtime.keys_values == "fp32":  # llama.cpp's flash attention computes in fp16
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(model, params)
        if self._context is None:
            raise MeasureError(
                f"llama.cpp failed to create a context of {capacity} tokens", hint="Use a shorter prompt"
            )
        self._batch = llama_cpp.llama_batch_init(batch_size, 0, 1)
        weakref.finalize(self, _free, self._context, self._batch)

    def activate(self, adapter: Any) -> None:
        """Apply `adapter` to all further computations of this context."""
        llama_cpp.llama_set_adapters_lora(
            self._context, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)
        )

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self._length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index in rows
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise MeasureError(f"llama.cpp failed to compute {len(tokens)} tokens (status {status})")
        self._length += len(tokens)
        address = llama_cpp.llama_get_logits(self._context)
        shape = len(rows), self._vocabulary_size
        logits: np.ndarray = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape).copy()
        return logits

    def rollback(self, count: int) -> None:
        self._length -= count
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, self._length, -1)


def _free(context: Any, batch: Any) -> None:
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
