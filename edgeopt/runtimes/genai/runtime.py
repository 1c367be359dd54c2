"""ONNX Runtime through onnxruntime-genai: fused attention, packed projections, block-quantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from edgeopt.errors import BuildError, ConfigError
from edgeopt.runtimes.decoding import chunked_prefill
from edgeopt.runtimes.decoding.incremental_session import IncrementalSession
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.onnxruntime_common import prepacked_weights, thread_affinity
from edgeopt.runtimes.onnxruntime_common.mapped_memory import apply_memory_options, make_resident, mapped_regions
from edgeopt.runtimes.onnxruntime_common.session_options import OPTIMIZATION_LEVELS, SessionOptions
from edgeopt.runtimes.weight_types import reject_llamacpp_types

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target
    from edgeopt.runtimes.genai.c_api import Adapters, Generator, Model
    from edgeopt.runtimes.genai.predict import Estimate

HEAD_MULTIPLE = 16
GENERATION_GRAPH, SCORING_GRAPH = "model.onnx", "scoring.onnx"
UNKNOWN = {
    "packed_on_disk": ("memory/peak_rss_mib",),
    "prompt_lookup": ("latency/decode_p50_ms",),
    "gate_up_fused": ("size/engine_mib",),
}
"""What is not known beforehand where these are chosen."""
LONG_ROPE = "phi3"
"""The model type whose rotary factors may depend on the length of the prompt, which is then read as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Genai(SessionOptions):
    """CPU engines built by onnxruntime-genai's model builder in process.

    Attributes:
        accuracy_level: arithmetic of quantized products: 4 multiplies in int8, 1 in fp32 (slow, most exact).
        gate_up_fused: both matrices that an MLP begins with are multiplied at once.
    """

    format: ClassVar[str] = "genai-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("onnxruntime_genai",)
    fallback: ClassVar[PortableOnnx] = PortableOnnx()
    accuracy_level: int = 4
    gate_up_fused: bool = False

    def __post_init__(self) -> None:
        SessionOptions.__post_init__(self)
        if self.graph_optimization == "none":
            raise ConfigError(
                "ONNX Runtime multiplies rounded weights wrongly where it did not compute their scales beforehand",
                location="graph_optimization",
                hint="Give basic, extended or all",
            )
        if self.accuracy_level not in (1, 4):
            raise ConfigError(
                f"{self.accuracy_level} is no accuracy level", location="accuracy_level", hint="Choose 1 or 4"
            )

    @property
    def baseline(self) -> Self:
        return replace(self, packed_on_disk=False, mapped_weights="on_demand", prompt_lookup=0)

    def check(self, spec: ModelSpec) -> None:
        from edgeopt.runtimes.genai.builder import ARCHITECTURES

        reject_llamacpp_types(spec)
        if spec.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"onnxruntime-genai does not build {spec.architecture}",
                location="runtime",
                hint=f"Use runtime=onnx, or one of: {', '.join(ARCHITECTURES)}",
            )
        if spec.head_size % HEAD_MULTIPLE:
            raise ConfigError(
                f"ONNX Runtime's GroupQueryAttention takes head sizes that are a multiple of {HEAD_MULTIPLE}, "
                f"and this model's is {spec.head_size}",
                location="runtime",
                hint="Use runtime=onnx or another model",
            )
        if self.packed_on_disk:
            prepacked_weights.check(spec)
        if self.gate_up_fused and spec.adapters:
            raise ConfigError(
                "onnxruntime-genai fuses no matrices that adapters update",
                location="runtime.gate_up_fused",
                hint="Give false, or merge them: step.lora.merge=true",
            )
        if len({layer.kv_heads for layer in spec.layers}) > 1:
            raise ConfigError(
                "onnxruntime-genai keeps one key-value cache shape for all layers, and this model's differ",
                location="runtime",
                hint="Use runtime=onnx, or prune the same share of heads in every layer",
            )

    def estimate(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> Estimate:
        """What an engine takes on a target, part by part; `carried_bytes` as in `predict`."""
        from edgeopt.runtimes.genai import predict as genai_estimate

        return genai_estimate.estimate(
            spec,
            context_length=min(target.context_length, spec.context_length),
            chunk_tokens=self.prompt_tokens,
            carried_bytes=carried_bytes,
            packed_on_disk=self.packed_on_disk,
        )

    def breakdown(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> Mapping[str, int]:
        found = self.estimate(spec, target, carried_bytes=carried_bytes)
        on_disk = {} if "size/engine_mib" in self._unknown else found.on_disk
        return on_disk | ({} if "memory/peak_rss_mib" in self._unknown else found.in_memory)

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        from edgeopt.runtimes.genai.predict import predictions

        found = predictions(self.estimate(spec, target, carried_bytes=carried_bytes), spec, target)
        return tuple(m for m in found if m.metric not in self._unknown)

    @property
    def _unknown(self) -> set[str]:
        """Metrics of which arithmetic says nothing, as this runtime is set."""
        return {metric for knob, metrics in UNKNOWN.items() if getattr(self, knob) for metric in metrics}

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.genai import builder

        builder.build(checkpoint, directory, self, progress)

    def lint(self, engine: Engine) -> list[str]:
        from edgeopt.runtimes.onnxruntime_common.lint import slow_paths

        return slow_paths(engine.directory / "model.onnx")

    def open(self, engine: Engine, *, threads: int) -> Session:
        engine.require_format(self.format)
        return GenaiSession(self, engine, threads)


class GenaiSession(IncrementalSession):
    """One engine in memory, one of its two graphs at a time; sequences run one after another."""

    backends = ("CPUExecutionProvider",)

    def __init__(self, runtime: Genai, engine: Engine, threads: int) -> None:
        self._runtime, self._directory, self._spec = runtime, engine.directory, engine.spec
        self._options = {
            "intra_op_num_threads": threads,
            "enable_cpu_mem_arena": runtime.arena,
            "graph_optimization_level": OPTIMIZATION_LEVELS[runtime.graph_optimization],
            **runtime.config_entries(threads),
        }
        self._pin_thread = thread_affinity.pin_calling_thread(runtime.cpu_ids(threads))
        described = json.loads((self._directory / "genai_config.json").read_text())["model"]
        self._window = int(described["decoder"].get("sliding_window", {}).get("window_size", 0))
        self._chunk_tokens = described["context_length"] if described["type"] == LONG_ROPE else runtime.prompt_tokens
        self._draft_tokens = runtime.prompt_lookup
        ends = described["eos_token_id"]
        self._end_tokens = frozenset(ends if isinstance(ends, list) else [ends])
        self._graph = ""
        self._model: Model | None = None
        self._adapters: Adapters | None = None
        self._load(SCORING_GRAPH if runtime.prompt_lookup else GENERATION_GRAPH)

    def _load(self, graph: str) -> Model:
        from edgeopt.runtimes.genai.c_api import Model

        if self._model is None or self._graph != graph:
            self.close()
            decoder = {"filename": graph, "session_options": self._options}
            try:
                self._model = Model(self._directory, {"model": {"decoder": decoder}})
            except RuntimeError as error:
                raise BuildError(f"the engine cannot be opened ({error})", location=str(self._directory)) from error
            data = self._directory / f"{GENERATION_GRAPH}.data"
            apply_memory_options(data, self._runtime)
            make_resident(mapped_regions(data), self._runtime.mapped_weights)
            self._graph = graph
        return self._model

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        if self._draft_tokens:
            yield from super().generate(tokens, max_new_tokens, stop_at_end=stop_at_end, adapter=adapter)
            return
        length = len(tokens) + max_new_tokens
        generator = self._generator(GENERATION_GRAPH, length, minimum=0 if stop_at_end else length, adapter=adapter)
        for part in chunked_prefill.split(tokens, self._chunk_tokens):
            generator.append(part)
        for _ in range(max_new_tokens):
            token = generator.next()
            if stop_at_end and token in self._end_tokens:
                return
            yield token

    def close(self) -> None:
        self._graph, self._model, self._adapters = "", None, None

    def _new_sequence(self, length: int, adapter: str | None) -> _Sequence:
        """By the graph that computes the logits of every token."""
        return _Sequence(self._generator(SCORING_GRAPH, length, minimum=0, adapter=adapter))

    def _generator(self, graph: str, length: int, *, minimum: int, adapter: str | None) -> Generator:
        from edgeopt.runtimes.genai.c_api import Generator

        capacity = max(length, self._window)  # of the key-value cache, which must hold a sliding window
        model = self._load(graph)
        generator = Generator(model, capacity=capacity, minimum=minimum, pin_thread=self._pin_thread)
        if adapter is not None:
            self._activate(adapter, model, generator)
        return generator

    def _activate(self, adapter: str, model: Model, generator: Generator) -> None:
        """Let the generator compute with an adapter, which stays loaded as long as the graph does."""
        from edgeopt.checkpoints import adapters
        from edgeopt.runtimes.genai.adapters import path_of
        from edgeopt.runtimes.genai.c_api import Adapters

        adapters.require(adapter, self._spec)
        self._adapters = self._adapters or Adapters(model)
        self._adapters.load(adapter, path_of(self._directory, adapter))
        generator.activate(self._adapters, adapter)


class _Sequence:
    """What a generator has read of one sequence, and can take back."""

    def __init__(self, generator: Generator) -> None:
        self._generator, self._length = generator, 0

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        self._generator.append(tokens)
        self._length += len(tokens)
        found: np.ndarray = self._generator.output("logits")[0, list(rows)]
        return found

    def rollback(self, count: int) -> None:
        if count:
            self._length -= count
            self._generator.rewind(self._length)
