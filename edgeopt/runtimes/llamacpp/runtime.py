"""llama.cpp: GGUF engines, which most people would pick for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeopt.core.model_spec import EMBEDDING
from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import chunked_prefill
from edgeopt.runtimes.decoding import prompt_lookup as lookup
from edgeopt.runtimes.llamacpp.families import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target

BLOCK_SIZE = 32
"""Of the types that hold edgeopt's whole numbers as they are: Q4_0, Q4_1 and Q8_0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """CPU engines of llama.cpp: weights in fp32, fp16, types of its own, or on grids of 4 and 8 bits in blocks of 32.

    Attributes:
        keys_values: the type in which a session keeps keys and values.
        prompt_tokens: tokens of a prompt that are computed at once; more take memory for activations and are faster.
        mapped: weights are read from the file as they are needed, and shared by processes; else they are copied.
        prompt_lookup: as in edgeopt.runtimes.onnxruntime_common.session_options.Knobs.
        repacked: weights are copied into the layout that the processor multiplies fastest, where there is one.
    """

    format: ClassVar[str] = "llamacpp-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("numpy", "llama_cpp")
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"keys_values", "prompt_tokens", "prompt_lookup", "mapped", "repacked"}
    )
    fallback: ClassVar[None] = None
    keys_values: Literal["fp32", "fp16", "int8", "int4"] = "fp16"
    prompt_tokens: int = 512
    prompt_lookup: int = 0
    mapped: bool = True
    repacked: bool = True

    def __post_init__(self) -> None:
        chunked_prefill.check(self.prompt_tokens)
        lookup.check(self.prompt_lookup, at_once=self.prompt_tokens)

    @property
    def baseline(self) -> Self:
        whole = self.keys_values if self.keys_values in ("fp32", "fp16") else "fp16"
        return replace(self, keys_values=whole, prompt_lookup=0)

    def check(self, spec: ModelSpec) -> None:
        if not all(map(find_spec, ("gguf", "llama_cpp"))):
            raise ConfigError(
                "llama-cpp-python is not installed", location="runtime", hint="pip install 'edgeopt[llamacpp]'"
            )
        if spec.architecture not in FAMILIES:
            raise ConfigError(
                f"GGUF engines of {spec.architecture} are not known",
                location="runtime",
                hint=f"Use runtime=genai or onnx, or one of: {', '.join(FAMILIES)}",
            )
        if spec.kv_cache is not None:
            raise ConfigError(
                "llama.cpp finds the scales of keys and values by itself, and takes none from calibration text",
                location="runtime",
                hint="Give runtime.keys_values=int8 in place of the step",
            )
        if spec.varied and not FAMILIES[spec.architecture].varied:
            raise ConfigError(
                f"llama.cpp takes the sizes of the first layer for all of {spec.architecture}, and this model's differ",
                location="runtime",
                hint="Use runtime=onnx, or prune the same share of every layer: step.prune.distribution=uniform",
            )
        if self.keys_values in ("int8", "int4") and spec.head_size % BLOCK_SIZE:
            raise ConfigError(
                f"heads of {spec.head_size} channels have no whole blocks of {BLOCK_SIZE}",
                location="runtime.keys_values",
                hint="Give fp16",
            )
        for name, grid in spec.schemes.items():
            if not _is_known(grid):
                raise ConfigError(
                    f"{name} is on a grid of {grid.bits} bits in blocks of {grid.block_size}, and llama.cpp's own have "
                    f"{BLOCK_SIZE}, of 4 bits or of 8 symmetric ones, with inputs in float",
                    location="runtime",
                    hint=f"Give step.quantize.block_size={BLOCK_SIZE}, and 8 bits symmetric=true",
                )
            if spec.matrices[name][1] % BLOCK_SIZE:
                raise ConfigError(
                    f"{name} has {spec.matrices[name][1]} columns, which {BLOCK_SIZE} does not divide",
                    location="runtime",
                    hint=f"Keep it in float, or prune in multiples of {BLOCK_SIZE}",
                )

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        from edgeopt.runtimes.llamacpp import predict as estimate

        return (estimate.size(spec, carried_bytes=carried_bytes),)

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.llamacpp import export

        export.build(checkpoint, directory, progress=progress)

    def lint(self, engine: Engine) -> list[str]:
        spec = engine.spec
        if spec.schemes and EMBEDDING not in spec.schemes and spec.tied_embeddings:
            return ["the table is in float, and is read whole for every token: put lm_head and embedding on a grid"]
        return []

    def open(self, engine: Engine, *, threads: int) -> Session:
        from edgeopt.runtimes.llamacpp.session import LlamaCppSession

        engine.require_format(self.format)
        return LlamaCppSession(self, engine, threads)


def _is_known(grid: QuantizationScheme) -> bool:
    in_blocks = grid.inputs == "float" and grid.block_size == BLOCK_SIZE
    return in_blocks and (grid.bits == 4 or (grid.bits == 8 and grid.symmetric))
