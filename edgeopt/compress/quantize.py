"""Weight quantization, carried out when a runtime builds the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt import network as networks
from edgeopt.compress.preconditions import require_float
from edgeopt.errors import ConfigError
from edgeopt.spec import ModelSpec, Quantization

if TYPE_CHECKING:
    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Progress
    from edgeopt.text import Text

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """How an engine stores its weights: blocks of 4 or 8 bits, or `fp32`/`fp16` for no quantization.

    Attributes:
        weights: type of the projections.
        block_size: weights along the input side that share one scale.
        symmetric: whether blocks have no zero-point; left open, rtn is symmetric and k_quant is not.
        method: `rtn` rounds to nearest; `k_quant` searches scale and zero-point by weighted error.
        lm_head, embedding: types of the two tables, stored once where the model ties them and both are alike.
    """

    weights: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    block_size: int = 32
    symmetric: bool | None = None
    method: Literal["rtn", "k_quant"] = "rtn"
    lm_head: Literal["float", "int8", "int4"] = "int8"
    embedding: Literal["float", "int8", "int4"] = "float"

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"{self.block_size} is no block size",
                place="block_size",
                mend=f"Choose one of {', '.join(map(str, BLOCK_SIZES))}",
            )

        if self.symmetric and self.method == "k_quant":
            raise ConfigError(
                "k_quant always has zero-points", place="symmetric", mend="Leave symmetric open or use rtn"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "quantize")
        if self.weights in ("fp32", "fp16"):
            return replace(spec, weight_dtype=self.weights)
        inputs = {(layer.intermediate_size, layer.heads * spec.head_size) for layer in spec.layers}
        for side in sorted({spec.hidden_size}.union(*inputs)):
            if side % self.block_size:
                fitting = ", ".join(str(b) for b in BLOCK_SIZES if side % b == 0)
                raise ConfigError(
                    f"a block of {self.block_size} does not divide the matrix side {side}",
                    place="block_size",
                    mend=f"Choose one of {fitting or 'no quantization'}",
                )
        return replace(
            spec,
            quantization=Quantization(
                bits=int(self.weights.removeprefix("int")),
                block_size=self.block_size,
                symmetric=self.method == "rtn" if self.symmetric is None else self.symmetric,
                method=self.method,
                lm_head_bits=_bits(self.lm_head),
                embedding_bits=_bits(self.embedding),
            ),
        )

    def apply(self, checkpoint: Checkpoint, directory: Path, calibration: Text, progress: Progress) -> ModelSpec:
        networks.link(checkpoint, directory)
        return self.plan(checkpoint.spec)


def _bits(table: str) -> int:
    return 32 if table == "float" else int(table.removeprefix("int"))
