"""Rounding to nearest, with the range of each block clipped where that loses less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compress.layerwise_forward import InputStatistic
from edgeopt.compress.quantization import rounding

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.model_spec import QuantizationScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn:
    """Every weight goes to its nearest code.

    Attributes:
        clip: search each block's range for the least squared error, in place of taking all of it.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "none"
    REMAINING_ERROR: ClassVar[float] = 1.0
    clip: bool = True

    def round(self, weight: Tensor, grid: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        blocks = rounding.blocked(weight, grid.block_size)
        if self.clip:
            scales, zero_points = rounding.best(blocks, grid, rounding.weights_of(None, blocks))
        else:
            scales, zero_points = next(rounding.candidates(blocks, grid))
        return rounding.assembled(rounding.encode(blocks, scales, zero_points, grid.bits), scales, zero_points)
