"""Fit scales and codes alternately, like llama.cpp's k-quants."""

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
class KQuant:
    """Alternating fit of codes and scales that minimizes the squared error weighted by E[x²] of the input.

    After llama.cpp's make_qkx2_quants and its importance matrix. Zero-points are integers here.

    Attributes:
        rounds: number of alternations between fitting scales and rounding codes.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "second_moment"
    REMAINING_ERROR: ClassVar[float] = 0.9
    rounds: int = 4

    def round(self, weight: Tensor, scheme: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        """Quantize `weight`; see `edgeopt.compress.quantization.rounding.Rounding`."""
        blocks = rounding.to_blocks(weight, scheme.block_size)
        importance = rounding.channel_importance(statistic, blocks)
        scales, zero_points = rounding.search_scales(blocks, scheme, importance)
        scales = fit_scales(blocks, scales, zero_points, scheme.bits, importance, rounds=self.rounds)
        codes = rounding.quantize(blocks, scales, zero_points, scheme.bits)
        return rounding.to_quantized_matrix(codes, scales, zero_points)


def fit_scales(
    blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int, importance: Tensor, *, rounds: int
) -> Tensor:
    """Alternate between least-squares scales for the codes and nearest codes for the scales.

    Return scales of shape (rows, blocks) whose error is at most that of the given `scales` in every block.
    """
    import torch

    codes = rounding.quantize(blocks, scales, zero_points, bits)
    lowest = rounding.squared_error(blocks, codes, scales, zero_points, importance)
    for _ in range(rounds):
        fitted = rounding.least_squares_scales(blocks, codes, scales, zero_points, importance)
        codes = rounding.quantize(blocks, fitted, zero_points, bits)
        error = rounding.squared_error(blocks, codes, fitted, zero_points, importance)
        scales, lowest = torch.where(error < lowest, fitted, scales), torch.minimum(error, lowest)
        codes = rounding.quantize(blocks, scales, zero_points, bits)
    return scales
