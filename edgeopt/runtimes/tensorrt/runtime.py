"""Build TensorRT engines on the NVIDIA GPU that runs them, or a build plan on other machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeopt.core.model_spec import EMBEDDING
from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import chunked_prefill, prompt_lookup
from edgeopt.runtimes.weight_types import reject_llamacpp_types

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target

FIRST_VERSION, FIRST_UNSUPPORTED_VERSION = (10, 3), (12, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRt:
    """TensorRT engines for one GPU, built from the portable ONNX graph as strongly typed networks.

    Attributes:
        version: oldest TensorRT version that must be able to build the engine: `11.0`, or `10.3` for JetPack 6.
        numbers: data type of the computation and of the KV cache, except where a quantization scheme sets another.
        in_fp32: patterns of units that compute in fp32 in any case, such as `layers.0.down`, `layers.*.o` or `lm_head`.
        prompt_tokens: largest number of prompt tokens that one call computes.
        workspace_mib: limit of GPU memory for intermediate results; 0 sets no limit.
        weights_mib: weights that stay in GPU memory, the rest is streamed from host memory; 0 keeps all on the GPU.
        refit: the engine accepts new weights without a rebuild.
        version_compatible: later TensorRT versions of the same major version can load the engine.
        hardware: GPUs that can load the engine: the same model, the same compute capability, or Ampere and newer.
        optimization_level: TensorRT's builder optimization level, from 0 (fastest build) to 5 (longest search).
        cuda_graphs: launch the kernels of one decoding step as one CUDA graph.
        prompt_lookup: number of tokens drafted at once from earlier text; 0 disables it. The output stays the same.
    """

    format: ClassVar[str] = "tensorrt-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("torch", "tensorrt")
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset({"cuda_graphs", "prompt_lookup"})
    fallback: ClassVar[None] = None
    version: str = "11.0"
    numbers: Literal["fp16", "fp32"] = "fp16"
    in_fp32: tuple[str, ...] = ()
    prompt_tokens: int = 512
    workspace_mib: int = 0
    weights_mib: int = 0
    refit: bool = False
    version_compatible: bool = False
    hardware: Literal["this", "same_compute_capability", "ampere_plus"] = "this"
    optimization_level: int = 3
    cuda_graphs: bool = True
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        is_number = self.version.replace(".", "", 1).isdigit()
        if not is_number or not FIRST_VERSION <= self.min_version < FIRST_UNSUPPORTED_VERSION:
            raise ConfigError(
                f"`version` must be a TensorRT version from 10.3 to 11.x, got {self.version!r}",
                location="version",
                hint="Use 11.0, or 10.3 for JetPack 6",
            )
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError(
                f"`optimization_level` must be between 0 and 5, got {self.optimization_level}",
                location="optimization_level",
                hint="Use 3, TensorRT's default",
            )
        for name in ("workspace_mib", "weights_mib"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"`{name}` must not be negative, got {getattr(self, name)}",
                    location=name,
                    hint="Use 0 to set no limit",
                )
        chunked_prefill.check(self.prompt_tokens)
        prompt_lookup.check(self.prompt_lookup, chunk_tokens=self.prompt_tokens)

    @property
    def min_version(self) -> tuple[int, int]:
        """Return `version` as a pair of major and minor version."""
        major, _, minor = self.version.partition(".")
        return int(major), int(minor or 0)

    def build_device(self) -> str:
        """Return the GPU and TensorRT version that build engines here, or an empty string if one is missing."""
        from edgeopt.runtimes.tensorrt import gpu, library

        identity = gpu.detect()
        version = library.installed_version() if identity else ""
        return f"{identity}, TensorRT {version}" if version else ""

    def fp32_units(self, spec: ModelSpec) -> frozenset[str]:
        """Return the names of the units that compute in fp32. Tied embeddings count as one unit."""
        if self.numbers == "fp32":
            return frozenset(spec.matrices)
        units = {unit for unit in spec.matrices for pattern in self.in_fp32 if fnmatchcase(unit, pattern)}
        tables = {"lm_head", EMBEDDING}
        return frozenset(units | tables if spec.tied_embeddings and units & tables else units)

    @property
    def baseline(self) -> Self:
        return replace(self, prompt_lookup=0)

    def check(self, spec: ModelSpec) -> None:
        reject_llamacpp_types(spec)
        for pattern in self.in_fp32:
            if not any(fnmatchcase(unit, pattern) for unit in spec.matrices):
                raise ConfigError(
                    f"`in_fp32` must match units of the model, got {pattern!r}",
                    location="runtime.in_fp32",
                    hint="Use names such as lm_head or layers.0.down",
                )
        if spec.kv_cache is not None:
            raise ConfigError(
                "this runtime does not support a quantized KV cache",
                location="runtime",
                hint="Remove the kv_cache step",
            )
        if spec.adapters:
            raise ConfigError(
                "TensorRT engines do not support adapters at run time",
                location="runtime",
                hint="Merge them into the weights with step.lora.merge=true",
            )
        faults: dict[str, str] = {}
        for name, scheme in spec.schemes.items():
            faults.setdefault(_scheme_fault(name, scheme), name)  # report the first unit of each fault
        faults.pop("", None)
        if faults:
            raise ConfigError(
                "; ".join(f"{name} {fault}" for fault, name in faults.items()),
                location="runtime",
                hint=". ".join(_HINTS[fault] for fault in faults),
            )

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        return ()

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.tensorrt import builder, gpu, library
        from edgeopt.runtimes.tensorrt import plan as plans

        plan = plans.create(self, checkpoint, directory, progress)
        if self.build_device():
            builder.build(plan, directory, trt=library.load(), gpu=gpu.CudaGpu(), progress=progress)
        else:
            progress(
                "this machine has no NVIDIA GPU or no TensorRT: wrote a build plan instead of an engine. "
                "Build the engine on the device with `edgeopt build-plan DIR`"
            )

    def lint(self, engine: Engine) -> list[str]:
        return []

    def open(self, engine: Engine, *, threads: int) -> Session:
        from edgeopt.runtimes.tensorrt import gpu, library
        from edgeopt.runtimes.tensorrt.engine_identity import EngineIdentity
        from edgeopt.runtimes.tensorrt.session import TensorRtSession

        engine.require_format(self.format)
        identity = EngineIdentity.read(engine.directory)
        return TensorRtSession(engine, self, identity, trt=library.load(), gpu=gpu.CudaGpu())


_ASYMMETRIC, _DYNAMIC_INPUTS, _UNSUPPORTED_BITS, _QUANTIZED_EMBEDDING = (
    "has an asymmetric quantization scheme",
    "has 8-bit inputs with dynamic ranges",
    "has a scheme other than 4-bit weights or 8-bit weights with 8-bit inputs",
    "is a quantized embedding table",
)
_HINTS = {
    _ASYMMETRIC: "TensorRT supports symmetric quantization only: set symmetric=true",
    _DYNAMIC_INPUTS: "TensorRT needs ranges from calibration text: set ranges=min_max or another calibrated choice",
    _UNSUPPORTED_BITS: "Use int4, or the step int8_activations",
    _QUANTIZED_EMBEDDING: "TensorRT looks up embedding rows in float only: set embedding=float",
}


def _scheme_fault(name: str, scheme: QuantizationScheme) -> str:
    """Return the reason why TensorRT does not support the scheme of unit `name`, or an empty string if it does."""
    if name == EMBEDDING:
        return _QUANTIZED_EMBEDDING
    if scheme.inputs == "dynamic":
        return _DYNAMIC_INPUTS
    if (scheme.bits, scheme.inputs) not in ((4, "float"), (8, "static")):
        return _UNSUPPORTED_BITS
    return "" if scheme.symmetric else _ASYMMETRIC
