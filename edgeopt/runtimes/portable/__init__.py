"""Portable ONNX: standard operators alone, so that every decoder of transformers and every consumer of ONNX fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.artifact import Checkpoint, Engine
    from edgeopt.ports import Progress, Session
    from edgeopt.result import Measurement
    from edgeopt.spec import ModelSpec
    from edgeopt.target import Target

OPSETS = (23, 20, 18)
WEIGHT_BITS, GRID_OPSET = {4, 8}, 21
"""Of weights on a grid, and from which opset on there are blocks of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortableOnnx:
    """Engines of ONNX Runtime from torch's exporter, with weights in fp32, stored in fp16 or on grids of 4 and 8 bits.

    Attributes:
        opset: version of the ONNX standard; 23 keeps attention and norms as one operator each.
        provider: what ONNX Runtime computes by; its GPU builds have `cuda` and `tensorrt`.
        spinning, prepacked, arena: as in edgeopt.runtimes.genai.Genai.
        cpu_fallback: where the provider cannot be had, the CPU takes its place; else that is an error.
    """

    format: ClassVar[str] = "onnx-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("numpy", "onnxruntime")
    OPENING: ClassVar[frozenset[str]] = frozenset({"provider", "cpu_fallback", "spinning", "prepacked", "arena"})
    otherwise: ClassVar[None] = None
    opset: int = 23
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    cpu_fallback: bool = False
    spinning: bool = True
    prepacked: bool = True
    arena: bool = True

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ConfigError(
                f"{self.opset} is no opset that is tried",
                place="opset",
                mend=f"Choose one of: {', '.join(map(str, OPSETS))}",
            )

    def check(self, spec: ModelSpec) -> None:
        bits = {grid.bits for grid in spec.grids.values()}
        if spec.kv_cache is not None or not bits <= WEIGHT_BITS:
            what = "keys and values on a grid" if spec.kv_cache is not None else "weights of 2 bits"
            raise ConfigError(f"portable ONNX knows no {what}", place="runtime", mend="Use runtime=genai")
        if bits and self.opset < GRID_OPSET:
            raise ConfigError(
                f"opset {self.opset} knows no rounded weights in blocks", place="opset", mend=f"Give {OPSETS[0]}"
            )

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        return ()

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.portable import export

        export.build(checkpoint, directory, dialect=export.Dialect(opset=self.opset), progress=progress)

    def lint(self, engine: Engine) -> list[str]:
        from edgeopt.runtimes.portable import graph

        return graph.findings(engine.directory / graph.NAME)

    def open(self, engine: Engine, *, threads: int) -> Session:
        from edgeopt.runtimes.portable.session import PortableSession

        engine.require_format(self.format)
        return PortableSession(self, engine, threads)
