"""Build GGUF engines and run them on the CPU with llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeopt.core.model_spec import EMBEDDING
from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import chunked_prefill, prompt_lookup
from edgeopt.runtimes.llamacpp.families import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target

BLOCK_SIZE = 32
"""Block size of Q4_0, Q4_1 and Q8_0, the GGUF types that store edgeopt's quantized values exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """llama.cpp on the CPU: fp32, fp16, llama.cpp's own types, or edgeopt's 4- and 8-bit schemes in blocks of 32.

    Attributes:
        keys_values: data type of the KV cache.
        prompt_tokens: number of prompt tokens computed at once. More are faster and need more memory.
        mapped: map the weights from the file, shared between processes; otherwise copy them into memory.
        prompt_lookup: number of tokens drafted at once from earlier text; 0 disables it. The output stays the same.
        repacked: copy the weights into the layout that this CPU multiplies fastest, if llama.cpp has one.
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
        prompt_lookup.check(self.prompt_lookup, chunk_tokens=self.prompt_tokens)

    @property
    def baseline(self) -> Self:
        lossless = self.keys_values if self.keys_values in ("fp32", "fp16") else "fp16"
        return replace(self, keys_values=lossless, prompt_lookup=0)

    def check(self, spec: ModelSpec) -> None:
        if not all(map(find_spec, ("gguf", "llama_cpp"))):
            raise ConfigError(
                "llama-cpp-python is not installed",
                location="runtime",
                hint="Install it with `pip install 'edgeopt[llamacpp]'`",
            )
        if spec.architecture not in FAMILIES:
            raise ConfigError(
                f"runtime=llamacpp does not support {spec.architecture}",
                location="runtime",
                hint=f"Use runtime=genai or runtime=onnx, or a model of {', '.join(FAMILIES)}",
            )
        if spec.kv_cache is not None:
            raise ConfigError(
                "llama.cpp computes the scales of a quantized KV cache at run time and cannot use calibrated scales",
                location="runtime",
                hint="Remove the kv_cache step and set runtime.keys_values=int8",
            )
        if spec.has_varied_layers and not FAMILIES[spec.architecture].varied_name:
            raise ConfigError(
                f"all layers must have the same sizes: llama.cpp uses those of the first layer for {spec.architecture}",
                location="runtime",
                hint="Use runtime=onnx, or prune every layer by the same ratio with step.prune.distribution=uniform",
            )
        if self.keys_values in ("int8", "int4") and spec.head_size % BLOCK_SIZE:
            raise ConfigError(
                f"the head size must be a multiple of {BLOCK_SIZE} for `keys_values` = {self.keys_values}, "
                f"got {spec.head_size}",
                location="runtime.keys_values",
                hint="Use fp16",
            )
        for name, scheme in spec.schemes.items():
            if not _is_supported(scheme):
                raise ConfigError(
                    f"{name} must have 4 bits or symmetric 8 bits in blocks of {BLOCK_SIZE}, with float inputs; "
                    f"got {scheme.bits} bits in blocks of {scheme.block_size}",
                    location="runtime",
                    hint=f"Set step.quantize.block_size={BLOCK_SIZE}, and symmetric=true for 8 bits",
                )
            if spec.matrices[name][1] % BLOCK_SIZE:
                raise ConfigError(
                    f"{name} must have a multiple of {BLOCK_SIZE} columns, got {spec.matrices[name][1]}",
                    location="runtime",
                    hint=f"Keep it in float, or prune in multiples of {BLOCK_SIZE}",
                )

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        from edgeopt.runtimes.llamacpp import predict

        return (predict.size(spec, copied_bytes=copied_bytes),)

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.llamacpp import export

        export.build(checkpoint, directory, progress=progress)

    def lint(self, engine: Engine) -> list[str]:
        spec = engine.spec
        if spec.schemes and EMBEDDING not in spec.schemes and spec.tied_embeddings:
            return [
                "the tied embedding table is in float and is read completely for every token: "
                "quantize lm_head and embedding"
            ]
        return []

    def open(self, engine: Engine, *, threads: int) -> Session:
        from edgeopt.runtimes.llamacpp.session import LlamaCppSession

        engine.require_format(self.format)
        return LlamaCppSession(self, engine, threads)


def _is_supported(scheme: QuantizationScheme) -> bool:
    has_blocks = scheme.inputs == "float" and scheme.block_size == BLOCK_SIZE
    return has_blocks and (scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric))
