"""Portable engines in memory, and foreign ONNX graphs that keep their keys and values in the usual ways."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from edgeopt import adapters
from edgeopt.errors import BuildError
from edgeopt.runtimes import greedy
from edgeopt.runtimes.portable import graph
from edgeopt.runtimes.portable.caches import Cache, cache_of
from edgeopt.runtimes.prompts import CHUNK_TOKENS, chunks
from edgeopt.tokens import end_tokens

if TYPE_CHECKING:
    from edgeopt.artifact import Engine

BY_LENGTH = ("longrope", "dynamic")
"""Rotary tables that depend on the length of the prompt, which is then read as a whole."""
PROVIDER = "CPUExecutionProvider"


class PortableSession:
    """One graph in memory; sequences run one after another, each with a cache of its own."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self._spec, self._directory = engine.spec, engine.directory
        self._ends = end_tokens(engine.directory)
        self._chunk = engine.spec.context_length if _is_by_length(engine.directory) else CHUNK_TOKENS
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(
                engine.directory / graph.NAME, options, providers=[PROVIDER]
            )
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            raise BuildError(f"the engine cannot be opened ({error})", place=str(engine.directory)) from error

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        cache = self._cache(len(tokens) + max_new_tokens, adapter)

        def read(given: Sequence[int]) -> np.ndarray:
            last: np.ndarray = [cache.read(part, [len(part) - 1])[0] for part in chunks(given, self._chunk)][-1]
            return last

        yield from greedy.decode(read, tokens, max_new_tokens, ends=self._ends, stop_at_end=stop_at_end)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        cache = self._cache(len(tokens), adapter)
        return np.concatenate([cache.read(part, range(len(part))) for part in chunks(tokens, self._chunk)])

    def close(self) -> None:
        self._session = None

    def _cache(self, capacity: int, adapter: str | None) -> Cache:
        return cache_of(self._session, self._spec, capacity, self._factors(adapter))

    def _factors(self, adapter: str | None) -> Mapping[str, np.ndarray]:
        """The inputs by which the graph computes with an adapter."""
        adapters.require(adapter, self._spec)
        return adapters.arrays(self._directory, adapter) if adapter else {}


def _is_by_length(directory: Path) -> bool:
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type", rope.get("type")) in BY_LENGTH
