"""Run models on onnxruntime-genai: fused attention, block-quantized weights, CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from edgeopt.errors import BuildError, ConfigError
from edgeopt.runtimes.decoding import chunked_prefill
from edgeopt.runtimes.decoding.incremental_session import IncrementalSession
from edgeopt.runtimes.genai.layout import GENERATION_GRAPH, SCORING_GRAPH, adapter_path
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
    from edgeopt.runtimes.genai.predict import EngineSizes

HEAD_SIZE_MULTIPLE = 16
UNPREDICTABLE: Mapping[str, tuple[str, ...]] = {
    "packed_on_disk": ("memory/peak_rss_mib",),
    "prompt_lookup": ("latency/decode_p50_ms",),
    "gate_up_fused": ("size/engine_mib",),
}
"""Metrics that cannot be predicted if the field is set."""
LENGTH_DEPENDENT_ROPE_TYPE = "phi3"
"""Model type whose rotary frequencies may depend on the prompt length, so that its prompts are read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Genai(SessionOptions):
    """CPU engines built in process by onnxruntime-genai's model builder.

    Attributes:
        accuracy_level: precision of quantized matrix products: 4 computes in int8, 1 in fp32 (slow, most exact).
        gate_up_fused: fuse the gate and up projections of an MLP into one matrix product.
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
                "`graph_optimization` must not be none: ONNX Runtime computes quantized products wrongly unless it "
                "folds their scales on opening",
                location="graph_optimization",
                hint="Use basic, extended or all",
            )
        if self.accuracy_level not in (1, 4):
            raise ConfigError(
                f"`accuracy_level` must be 1 or 4, got {self.accuracy_level}",
                location="accuracy_level",
                hint="Use 4 for speed, or 1 for exact results",
            )

    @property
    def baseline(self) -> Self:
        return replace(self, packed_on_disk=False, mapped_weights="on_demand", prompt_lookup=0)

    def check(self, spec: ModelSpec) -> None:
        from edgeopt.runtimes.genai.builder import ARCHITECTURES

        reject_llamacpp_types(spec)
        if spec.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"onnxruntime-genai does not support {spec.architecture}",
                location="runtime",
                hint=f"Use runtime=onnx, or one of: {', '.join(ARCHITECTURES)}",
            )
        if spec.head_size % HEAD_SIZE_MULTIPLE:
            raise ConfigError(
                f"the head size must be a multiple of {HEAD_SIZE_MULTIPLE} for ONNX Runtime's GroupQueryAttention, "
                f"got {spec.head_size}",
                location="runtime",
                hint="Use runtime=onnx or another model",
            )
        if self.packed_on_disk:
            prepacked_weights.check(spec)
        if self.gate_up_fused and spec.adapters:
            raise ConfigError(
                "`gate_up_fused` must be false for a model with adapters: the fused product has no adapter branch",
                location="runtime.gate_up_fused",
                hint="Use false, or merge the adapters with step.lora.merge=true",
            )
        if len({layer.kv_heads for layer in spec.layers}) > 1:
            raise ConfigError(
                "all layers must have the same number of key-value heads: onnxruntime-genai has one key-value cache "
                "shape",
                location="runtime",
                hint="Use runtime=onnx, or prune the same ratio of heads in every layer",
            )

    def predict_sizes(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> EngineSizes:
        """Return the predicted bytes of each part of an engine on a target.

        Args:
            copied_bytes: as in `Runtime.predict`.
        """
        from edgeopt.runtimes.genai.predict import predict_sizes

        return predict_sizes(
            spec,
            context_length=min(target.context_length, spec.context_length),
            chunk_tokens=self.prompt_tokens,
            copied_bytes=copied_bytes,
            packed_on_disk=self.packed_on_disk,
        )

    def breakdown(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> Mapping[str, int]:
        sizes = self.predict_sizes(spec, target, copied_bytes=copied_bytes)
        on_disk = {} if "size/engine_mib" in self._unpredictable else sizes.on_disk
        return on_disk | ({} if "memory/peak_rss_mib" in self._unpredictable else sizes.in_memory)

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        from edgeopt.runtimes.genai.predict import predict_metrics

        predictions = predict_metrics(self.predict_sizes(spec, target, copied_bytes=copied_bytes), spec, target)
        return tuple(m for m in predictions if m.metric not in self._unpredictable)

    @property
    def _unpredictable(self) -> set[str]:
        """Return the metrics that cannot be predicted under the options of this runtime."""
        return {metric for field, metrics in UNPREDICTABLE.items() if getattr(self, field) for metric in metrics}

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.genai import builder

        builder.build(checkpoint, directory, self, progress)

    def lint(self, engine: Engine) -> list[str]:
        from edgeopt.runtimes.onnxruntime_common.lint import slow_paths

        return slow_paths(engine.directory / GENERATION_GRAPH)

    def open(self, engine: Engine, *, threads: int) -> Session:
        engine.require_format(self.format)
        return GenaiSession(self, engine, threads)


class GenaiSession(IncrementalSession):
    """One engine in memory. It holds one of its two graphs at a time and runs one sequence at a time."""

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
        config = json.loads((self._directory / "genai_config.json").read_text())["model"]
        self._sliding_window = int(config["decoder"].get("sliding_window", {}).get("window_size", 0))
        read_at_once = config["type"] == LENGTH_DEPENDENT_ROPE_TYPE
        self._chunk_tokens = config["context_length"] if read_at_once else runtime.prompt_tokens
        self._draft_tokens = runtime.prompt_lookup
        eos = config["eos_token_id"]
        self._eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])
        self._graph = ""
        self._model: Model | None = None
        self._adapters: Adapters | None = None
        self._load(SCORING_GRAPH if runtime.prompt_lookup else GENERATION_GRAPH)

    def _load(self, graph: str) -> Model:
        """Return the model of `graph`, loaded in place of the other graph if necessary."""
        from edgeopt.runtimes.genai.c_api import Model

        if self._model is None or self._graph != graph:
            self.close()
            decoder = {"filename": graph, "session_options": self._options}
            try:
                self._model = Model(self._directory, {"model": {"decoder": decoder}})
            except RuntimeError as error:
                raise BuildError(f"the engine cannot be opened ({error})", location=str(self._directory)) from error
            weights = self._directory / f"{GENERATION_GRAPH}.data"
            apply_memory_options(weights, self._runtime)
            make_resident(mapped_regions(weights), self._runtime.mapped_weights)
            self._graph = graph
        return self._model

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        if self._draft_tokens:
            yield from super().generate(tokens, max_new_tokens, stop_at_end=stop_at_end, adapter=adapter)
            return
        length = len(tokens) + max_new_tokens
        min_length = 0 if stop_at_end else length
        generator = self._new_generator(GENERATION_GRAPH, length, min_length=min_length, adapter=adapter)
        for chunk in chunked_prefill.split(tokens, self._chunk_tokens):
            generator.append_tokens(chunk)
        for _ in range(max_new_tokens):
            token = generator.generate_next_token()
            if stop_at_end and token in self._eos_token_ids:
                return
            yield token

    def close(self) -> None:
        self._graph, self._model, self._adapters = "", None, None

    def _new_sequence(self, length: int, adapter: str | None) -> _GeneratorState:
        # only the scoring graph returns the logits of every token
        return _GeneratorState(self._new_generator(SCORING_GRAPH, length, min_length=0, adapter=adapter))

    def _new_generator(self, graph: str, length: int, *, min_length: int, adapter: str | None) -> Generator:
        from edgeopt.runtimes.genai.c_api import Generator

        max_length = max(length, self._sliding_window)  # the key-value cache must hold a full sliding window
        model = self._load(graph)
        generator = Generator(model, max_length=max_length, min_length=min_length, pin_thread=self._pin_thread)
        if adapter is not None:
            self._activate_adapter(adapter, model, generator)
        return generator

    def _activate_adapter(self, adapter: str, model: Model, generator: Generator) -> None:
        """Make the generator compute with an adapter. The adapter stays loaded as long as the graph."""
        from edgeopt.checkpoints import adapters
        from edgeopt.runtimes.genai.c_api import Adapters

        adapters.require(adapter, self._spec)
        self._adapters = self._adapters or Adapters(model)
        self._adapters.load(adapter, self._directory / adapter_path(adapter))
        generator.set_active_adapter(self._adapters, adapter)


class _GeneratorState:
    """A SequenceState on the scoring graph."""

    def __init__(self, generator: Generator) -> None:
        self._generator, self._length = generator, 0

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        self._generator.append_tokens(tokens)
        self._length += len(tokens)
        logits: np.ndarray = self._generator.get_output("logits")[0, list(rows)]
        return logits

    def rollback(self, count: int) -> None:
        if count:
            self._length -= count
            self._generator.rewind_to(self._length)
