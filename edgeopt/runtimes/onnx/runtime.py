"""Build and open portable ONNX engines: standard operators, for every decoder of transformers and any ONNX consumer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeopt.core import units
from edgeopt.errors import ConfigError
from edgeopt.runtimes.onnxruntime_common import prepacked_weights
from edgeopt.runtimes.onnxruntime_common.session_options import SessionOptions
from edgeopt.runtimes.weight_types import reject_llamacpp_types

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target

OPSETS = (23, 20, 18, 17)
MAX_SHARDS = 99
WEIGHT_BITS = {4, 8}
BLOCK_QUANTIZATION_OPSET = 21
"""The first opset whose DequantizeLinear supports blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortableOnnx(SessionOptions):
    """ONNX Runtime on graphs from PyTorch's exporter. Weights are fp32, stored in fp16, or quantized to 4 or 8 bits.

    Attributes:
        opset: version of the ONNX standard. Opset 23 has attention and norms as single operators. Opset 17 is lowered
            from 18.
        keys_values: type of cached keys and values. int8 and int4 keep the most recent tokens in floating point. Each
            token dequantizes the whole cache of a layer, which takes time, and memory for one layer at once.
        provider: execution provider of ONNX Runtime. `cuda` and `tensorrt` require a GPU build.
        packed_on_disk: the engine's graph then contains operators of ONNX Runtime that are not in the standard.
        arena: keep memory for intermediate results between calls. Each shard has an arena of its own, which holds the
            attention scores of a chunk of the prompt and is large for long contexts.
        cpu_fallback: compute on the CPU if the provider is not available; otherwise that is an error.
        shards: number of shards of the graph. With several, a session can keep only a part of the weights in memory.
        resident: budget for weights that stay in memory, such as `512 MiB`, in addition to two shards in use. The
            other weights are read from storage for each token. None keeps all weights in memory.
        kv_resident: budget for keys and values that stay in memory. Those of the other shards are offloaded without
            loss to an unnamed file in the folder TMPDIR. None keeps all in memory.
        kv_window: lossy sliding window. Attention reads the first four tokens (attention sinks) and at least this many
            recent tokens; the tokens in between are dropped. None keeps all tokens.
        processes: number of processes that share the shards as a pipeline, as actors of the Ray cluster at RAY_ADDRESS
            or of one on this machine. Each has the budgets above. Memory metrics do not include these processes.
        read_ahead: prefetch a whole shard while the previous one computes. Otherwise the kernel reads weights when
            they are accessed.
    """

    format: ClassVar[str] = "onnx-2"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("numpy", "onnxruntime")
    SESSION_FIELDS: ClassVar[frozenset[str]] = SessionOptions.SESSION_FIELDS | {
        *("provider", "cpu_fallback", "resident", "kv_resident", "kv_window", "processes", "read_ahead")
    }
    fallback: ClassVar[None] = None
    opset: int = 23
    keys_values: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    cpu_fallback: bool = False
    shards: int = 1
    resident: str | None = None
    kv_resident: str | None = None
    kv_window: int | None = None
    processes: int = 1
    read_ahead: bool = False

    def __post_init__(self) -> None:
        SessionOptions.__post_init__(self)
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ConfigError(f"`shards` must be between 1 and {MAX_SHARDS}, got {self.shards}", location="shards")
        for name, budget_bytes in (("resident", self.resident_bytes), ("kv_resident", self.kv_resident_bytes)):
            if budget_bytes is not None:
                self._require_shards(name)
        if not 1 <= self.processes <= self.shards:
            raise ConfigError(
                f"`processes` must be between 1 and the number of shards ({self.shards}), got {self.processes}",
                location="processes",
                hint="Use 1, or increase shards",
            )
        if self.processes > 1:
            self._require_cpu("processes")
            if self.affinity is not None:
                raise ConfigError(
                    "`affinity` requires a single process, because hosts number their processors differently",
                    location="affinity",
                    hint="Use null, or processes=1",
                )
        if self.prompt_lookup and (self.kv_window is not None or self.keys_values in ("int8", "int4")):
            raise ConfigError(
                "`prompt_lookup` requires a lossless cache, because rejected drafts overwrite older tokens of a window "
                "or a quantized cache",
                location="prompt_lookup",
                hint="Use 0, or kv_window=null with keys_values=fp32 or fp16",
            )
        if self.kv_window is not None:
            self._require_cpu("kv_window")
            if self.kv_window < self.prompt_tokens:
                raise ConfigError(
                    f"`kv_window` must be at least `prompt_tokens` ({self.prompt_tokens}), got {self.kv_window}",
                    location="kv_window",
                    hint=f"Use {self.prompt_tokens} or more, or fewer prompt_tokens",
                )
        for name, default in {"packed_on_disk": False, "huge_pages": False, "mapped_weights": "on_demand"}.items():
            if getattr(self, name) != default:
                self._require_cpu(name)
        if self.resident is not None and self.prepacked and not self.packed_on_disk:
            raise ConfigError(
                "`prepacked` must be false with a `resident` budget, because prepacked weights are copies in memory",
                location="prepacked",
                hint="Use prepacked=false or packed_on_disk=true",
            )
        if self.opset not in OPSETS:
            raise ConfigError(
                f"`opset` must be one of {', '.join(map(str, OPSETS))}; got {self.opset}",
                location="opset",
                hint=f"Use {OPSETS[0]} unless the consumer of the graph is older",
            )

    @property
    def resident_bytes(self) -> int | None:
        """Return the budget for weights in memory, or None."""
        return None if self.resident is None else units.size_bytes(self.resident, "resident")

    @property
    def kv_resident_bytes(self) -> int | None:
        """Return the budget for keys and values in memory, or None."""
        return None if self.kv_resident is None else units.size_bytes(self.kv_resident, "kv_resident")

    @property
    def runs_shards(self) -> bool:
        """Return whether a session runs the shards one after another, to stay within a memory budget."""
        return self.resident is not None or self.kv_resident is not None

    def _require_shards(self, name: str) -> None:
        if self.shards == 1:
            raise ConfigError(
                f"`{name}` requires several shards, got shards=1", location=name, hint="Use shards=8, or null"
            )
        self._require_cpu(name)

    def _require_cpu(self, name: str) -> None:
        if self.provider != "cpu":
            raise ConfigError(
                f"`{name}` requires provider=cpu, got {self.provider}, which has memory of its own",
                location=name,
                hint="Use provider=cpu",
            )

    @property
    def baseline(self) -> Self:
        """Return this runtime without lossy options and without memory budgets."""
        lossless = replace(
            self,
            packed_on_disk=False,
            mapped_weights="on_demand",
            keys_values="fp32",
            kv_window=None,
            prompt_lookup=0,
            resident=None,
            kv_resident=None,
            read_ahead=False,
        )
        return lossless if self.processes > 1 else replace(lossless, shards=1)

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if ONNX operators or installed packages do not support the model."""
        reject_llamacpp_types(spec)
        if self.processes > 1 and not find_spec("ray"):
            raise ConfigError(
                "`processes` above 1 requires Ray, which is not installed",
                location="runtime.processes",
                hint="Run pip install 'edgeopt[ray]'",
            )
        if self.packed_on_disk:
            prepacked_weights.check(spec)
        if self.keys_values == "int4" and spec.head_size % 2:
            raise ConfigError(
                f"`keys_values` int4 requires an even head size, got {spec.head_size}",
                location="runtime.keys_values",
                hint="Use int8",
            )
        bits = {scheme.bits for scheme in spec.schemes.values()}
        if spec.kv_cache is not None:
            raise ConfigError(
                "portable ONNX does not support keys and values quantized with calibrated ranges",
                location="runtime",
                hint="Use runtime.keys_values=int8 instead of the step, or runtime=genai",
            )
        if not bits <= WEIGHT_BITS:
            raise ConfigError(
                f"portable ONNX supports weights of 4 or 8 bits, got {min(bits - WEIGHT_BITS)} bits",
                location="runtime",
                hint="Use runtime=genai",
            )
        if bits and self.opset < BLOCK_QUANTIZATION_OPSET:
            raise ConfigError(
                f"`opset` must be at least {BLOCK_QUANTIZATION_OPSET} for quantized weights, got {self.opset}",
                location="opset",
                hint=f"Use {OPSETS[0]}",
            )

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        """Return the predicted metrics of an engine; see `edgeopt.runtimes.onnx.predict`."""
        from edgeopt.runtimes.onnx.predict import predict

        return predict(spec, self, target, copied_bytes=copied_bytes)

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        """Export the checkpoint into the empty `directory`, then prepack and split it. Raises BuildError."""
        from edgeopt.runtimes.onnx import export, graph, shards

        options = export.ExportOptions(opset=self.opset, cache_type=self.keys_values)
        export.export_checkpoint(checkpoint, directory, options=options, progress=progress)
        if self.packed_on_disk:
            prepacked_weights.save(directory / graph.GRAPH_FILE)
        if self.shards > 1:
            shards.split(directory, self.shards)

    def lint(self, engine: Engine) -> list[str]:
        """Return one sentence for each nonstandard operator and for weights that are dequantized for every token."""
        from edgeopt.runtimes.onnx import graph

        findings = [] if self.packed_on_disk else graph.find_nonstandard_operators(engine.directory / graph.GRAPH_FILE)
        unfused = self.graph_optimization in ("none", "basic")
        if unfused and any(scheme.inputs != "dynamic" for scheme in engine.spec.schemes.values()):
            findings.append(
                f"graph_optimization={self.graph_optimization} dequantizes quantized weights again for each token"
            )
        return findings

    def open(self, engine: Engine, *, threads: int) -> Session:
        """Open the engine in this process, or in several. Raises BuildError if it cannot be opened."""
        engine.require_format(self.format)
        if self.processes > 1:
            from edgeopt.runtimes.onnx.ray_session import RaySession

            return RaySession(self, engine, threads)
        from edgeopt.runtimes.onnx.session import PortableSession

        return PortableSession(self, engine, threads)
