"""ONNX Runtime through onnxruntime-genai: fused attention, packed projections, block-quantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeopt.errors import BuildError, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.artifact import Checkpoint, Engine
    from edgeopt.ports import Progress, Session
    from edgeopt.spec import ModelSpec

HEAD_MULTIPLE = 16
GENERATING, SCORING = "model.onnx", "scoring.onnx"
CHUNK_TOKENS = 32
"""Tokens of a prompt that are read at once: more cost memory for activations and are hardly faster."""
LONG_ROPE = "phi3"
"""The model type whose rotary factors may depend on the length of the prompt, which is then read as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Genai:
    """CPU engines built by onnxruntime-genai's model builder in process.

    Attributes:
        accuracy_level: arithmetic of quantized products: 4 multiplies in int8, 1 in fp32 (slow, most exact).
    """

    format: ClassVar[str] = "genai-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("numpy", "onnxruntime_genai")
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in (1, 4):
            raise ConfigError(
                f"{self.accuracy_level} is no accuracy level", place="accuracy_level", mend="Choose 1 or 4"
            )

    def check(self, spec: ModelSpec) -> None:
        from edgeopt.runtimes.genai_builder import ARCHITECTURES

        if spec.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"onnxruntime-genai does not build {spec.architecture}",
                place="runtime",
                mend=f"Use runtime=torch, or one of: {', '.join(ARCHITECTURES)}",
            )
        if spec.head_size % HEAD_MULTIPLE:
            raise ConfigError(
                f"ONNX Runtime's GroupQueryAttention takes head sizes that are a multiple of {HEAD_MULTIPLE}, "
                f"and this model's is {spec.head_size}",
                place="runtime",
                mend="Use runtime=torch or another model",
            )
        if len({layer.kv_heads for layer in spec.layers}) > 1:
            raise ConfigError(
                "onnxruntime-genai keeps one key-value cache shape for all layers, and this model's differ",
                place="runtime",
                mend="Prune the same share of heads in every layer",
            )

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes import genai_builder

        genai_builder.build(checkpoint, directory, accuracy_level=self.accuracy_level, progress=progress)

    def lint(self, engine: Engine) -> list[str]:
        from edgeopt.runtimes.lint import slow_paths

        return slow_paths(engine.directory / "model.onnx")

    def open(self, engine: Engine, *, threads: int) -> Session:
        if engine.format != self.format:
            raise BuildError(
                f"this is a {engine.format} engine",
                place=str(engine.directory),
                mend=f"Give one of format {self.format}",
            )
        return GenaiSession(engine, threads)


class GenaiSession:
    """One engine in memory, one of its two graphs at a time; sequences run one after another."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self._directory, self._spec, self._threads = engine.directory, engine.spec, threads
        described = json.loads((self._directory / "genai_config.json").read_text())["model"]
        self._window = int(described["decoder"].get("sliding_window", {}).get("window_size", 0))
        self._chunk = described["context_length"] if described["type"] == LONG_ROPE else CHUNK_TOKENS
        self._graph = ""
        self._model: Any = None
        self._adapters: Any = None
        self._loaded: set[str] = set()
        self._load(GENERATING)

    def _load(self, graph: str) -> None:
        import onnxruntime_genai as genai

        if self._graph == graph:
            return
        self.close()
        config = genai.Config(str(self._directory))
        decoder = {"filename": graph, "session_options": {"intra_op_num_threads": self._threads}}
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        try:
            self._model = genai.Model(config)
        except Exception as error:  # the library raises RuntimeError and its own types
            raise BuildError(f"the engine cannot be opened ({error})", place=str(self._directory)) from error
        self._graph = graph

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        self._load(GENERATING)
        length = len(tokens) + max_new_tokens
        generator = self._generator(length, minimum=0 if stop_at_end else length, adapter=adapter)
        for part in self._chunks(tokens):
            generator.append_tokens(part)
        ends = self._ends if stop_at_end else frozenset()
        for _ in range(max_new_tokens):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                return
            yield token

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        import numpy as np

        self._load(SCORING)
        generator = self._generator(len(tokens), minimum=0, adapter=adapter)
        logits = []
        for part in self._chunks(tokens):
            generator.append_tokens(part)
            logits.append(np.array(generator.get_output("logits")[0], dtype=np.float32))
        return np.concatenate(logits)

    def close(self) -> None:
        self._graph, self._model, self._adapters, self._loaded = "", None, None, set()

    @property
    def _ends(self) -> frozenset[int]:
        from onnxruntime_genai import Tokenizer

        return frozenset(map(int, Tokenizer(self._model).eos_token_ids))

    def _chunks(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        import numpy as np

        for start in range(0, len(tokens), self._chunk):
            yield np.asarray(tokens[start : start + self._chunk], dtype=np.int32)

    def _generator(self, length: int, *, minimum: int, adapter: str | None) -> Any:
        from onnxruntime_genai import Generator, GeneratorParams

        parameters = GeneratorParams(self._model)
        capacity = max(length, self._window)  # of the key-value cache, which must hold a sliding window
        parameters.set_search_options(max_length=capacity, min_length=minimum, do_sample=False)
        generator = Generator(self._model, parameters)
        if adapter is not None:
            self._activate(adapter, generator)
        return generator

    def _activate(self, adapter: str, generator: Any) -> None:
        """Let the generator compute with an adapter, which stays loaded as long as the graph does."""
        from onnxruntime_genai import Adapters

        from edgeopt import adapters
        from edgeopt.runtimes.genai_adapters import path_of

        adapters.require(adapter, self._spec)
        self._adapters = self._adapters or Adapters(self._model)
        if adapter not in self._loaded:
            self._adapters.load(str(path_of(self._directory, adapter)), adapter)
            self._loaded.add(adapter)
        generator.set_active_adapter(self._adapters, adapter)
