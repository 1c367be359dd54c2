"""Round every weight to its nearest code (RTN), optionally with clipped block ranges."""

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
    """Rounding to nearest.

    Attributes:
        clip: search the clipping range of each block for the lowest squared error, instead of using the full range.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "none"
    REMAINING_ERROR: ClassVar[float] = 1.0
    clip: bool = True

    def round(self, weight: Tensor, scheme: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        """Quantize `weight`; see `edgeopt.compress.quantization.rounding.Rounding`."""
        blocks = rounding.to_blocks(weight, scheme.block_size)
        if self.clip:
            importance = rounding.channel_importance(None, blocks)
            scales, zero_points = rounding.search_scales(blocks, scheme, importance)
        else:
            scales, zero_points = next(rounding.candidate_scales(blocks, scheme))
        codes = rounding.quantize(blocks, scales, zero_points, scheme.bits)
        return rounding.to_quantized_matrix(codes, scales, zero_points)
