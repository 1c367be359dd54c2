"""TensorRT: engines that one NVIDIA GPU runs, built on it; elsewhere the plan of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeopt.core.model_spec import EMBEDDING
from edgeopt.errors import ConfigError
from edgeopt.runtimes import floats
from edgeopt.runtimes.decoding import chunked_prefill
from edgeopt.runtimes.decoding import prompt_lookup as lookup

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target

VERSIONS = ((10, 3), (12, 0))
"""The first that is known, and the first that is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRt:
    """GPU engines of TensorRT from the portable graph, whose types and grids alone decide on precision.

    Attributes:
        version: the oldest TensorRT that is to build the engine: 11.0, or 10.3 for JetPack 6.
        numbers: what is computed in, and what keys and values are kept in, where no grid says otherwise.
        in_fp32: units that are computed in fp32 all the same, such as `layers.0.down`, `layers.*.o` or `lm_head`.
        prompt_tokens: tokens of a prompt that are computed at once, at most.
        workspace_mib: GPU memory for intermediate results, at most; 0 leaves it to TensorRT.
        weights_mib: weights that stay on the GPU, the others being streamed; 0 keeps all there.
        refit: the engine takes new weights without being built again.
        version_compatible: later versions of TensorRT load the engine, too.
        hardware: the GPUs that load it: of this name, of the same compute capability, or all since Ampere.
        optimization_level: from 0, built soonest, to 5, tried longest.
        cuda_graphs: a token's kernels are launched at once.
        prompt_lookup: as in edgeopt.runtimes.onnxruntime_common.session_options.Knobs.
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
        if not self.version.replace(".", "", 1).isdigit() or not VERSIONS[0] <= self.oldest < VERSIONS[1]:
            raise ConfigError(
                f"{self.version!r} is no version that is known", location="version", hint="Give 10.3 to 11.x"
            )
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError(
                f"{self.optimization_level} is no level", location="optimization_level", hint="Give 0 to 5"
            )
        for name in ("workspace_mib", "weights_mib"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{getattr(self, name)} is too few", location=name, hint="Give 0 or more")
        chunked_prefill.check(self.prompt_tokens)
        lookup.check(self.prompt_lookup, at_once=self.prompt_tokens)

    @property
    def oldest(self) -> tuple[int, int]:
        """The version as two numbers."""
        major, _, minor = self.version.partition(".")
        return int(major), int(minor or 0)

    def device(self) -> str:
        """The GPU and the TensorRT that engines are built by here; empty where one of them is missing."""
        from edgeopt.runtimes.tensorrt import gpu, library

        return f"{gpu.first()}, TensorRT {library.version()}" if gpu.first() and library.version() else ""

    def units_in_fp32(self, spec: ModelSpec) -> frozenset[str]:
        """The units that are computed in fp32; a tied table is one."""
        if self.numbers == "fp32":
            return frozenset(spec.matrices)
        found = {unit for unit in spec.matrices for pattern in self.in_fp32 if fnmatchcase(unit, pattern)}
        tables = {"lm_head", EMBEDDING}
        return frozenset(found | tables if spec.tied_embeddings and found & tables else found)

    @property
    def baseline(self) -> Self:
        return replace(self, prompt_lookup=0)

    def check(self, spec: ModelSpec) -> None:
        floats.require(spec)
        for pattern in self.in_fp32:
            if not any(fnmatchcase(unit, pattern) for unit in spec.matrices):
                raise ConfigError(
                    f"no unit is called {pattern!r}", location="runtime.in_fp32", hint="Give lm_head or layers.0.down"
                )
        if spec.kv_cache is not None:
            raise ConfigError(
                "TensorRT keeps no keys and values on a grid here", location="runtime", hint="Drop the step"
            )
        if spec.adapters:
            raise ConfigError(
                "TensorRT engines take no adapters at run time",
                location="runtime",
                hint="Merge them: step.lora.merge=true",
            )
        faults: dict[str, str] = {}
        for name, grid in spec.schemes.items():
            faults.setdefault(_fault(name, grid), name)  # one unit stands for all that lack the same
        faults.pop("", None)
        if faults:
            raise ConfigError(
                "; ".join(f"{name} is {fault}" for fault, name in faults.items()),
                location="runtime",
                hint=". ".join(_MENDS[fault] for fault in faults),
            )

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        return ()

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.tensorrt import builder, gpu, library, plan

        made = plan.draw(self, checkpoint, directory, progress)
        if self.device():
            builder.build(made, directory, trt=library.load(), gpu=gpu.Cuda(), progress=progress)
        else:
            progress("TensorRT or its GPU is not here: this is a plan, from which edgeopt build-plan makes an engine")

    def lint(self, engine: Engine) -> list[str]:
        return []

    def open(self, engine: Engine, *, threads: int) -> Session:
        from edgeopt.runtimes.tensorrt import gpu, library
        from edgeopt.runtimes.tensorrt.identity import BuiltBy
        from edgeopt.runtimes.tensorrt.session import TensorRtSession

        engine.require_format(self.format)
        built_by = BuiltBy.read(engine.directory)
        return TensorRtSession(engine, self, built_by, trt=library.load(), gpu=gpu.Cuda())


_UNSIGNED, _BY_CALL, _BITS, _TABLE = (
    "on a grid that is not symmetric",
    "multiplied with inputs whose range each call finds",
    "on a grid of neither 4 bits in blocks nor 8 bits with inputs in 8 bits",
    "a table on a grid",
)
_MENDS = {
    _UNSIGNED: "TensorRT's grids have their zero in the middle: give symmetric=true",
    _BY_CALL: "TensorRT wants ranges of calibration text: give ranges=min_max or another",
    _BITS: "Give int4, or the step int8_activations",
    _TABLE: "TensorRT looks up rows in float alone: give embedding=float",
}


def _fault(name: str, grid: QuantizationScheme) -> str:
    """What TensorRT does not take; empty where it takes the grid."""
    if name == EMBEDDING:
        return _TABLE
    if grid.inputs == "dynamic":
        return _BY_CALL
    if (grid.bits, grid.inputs) not in ((4, "float"), (8, "static")):
        return _BITS
    return "" if grid.symmetric else _UNSIGNED
