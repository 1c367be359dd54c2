"""Rounding whose scales are fitted to the codes, as llama.cpp's k-quants."""

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
    """Codes and scales fitted to one another in turn, by squared error weighted with the input's energy.

    After llama.cpp's make_qkx2_quants and its importance matrix, with whole zero-points.

    Attributes:
        rounds: how often scales are fitted to codes and codes to scales.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "second_moment"
    REMAINING_ERROR: ClassVar[float] = 0.9
    rounds: int = 4

    def round(self, weight: Tensor, grid: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        blocks = rounding.blocked(weight, grid.block_size)
        importance = rounding.weights_of(statistic, blocks)
        scales, zero_points = rounding.best(blocks, grid, importance)
        scales = fit_scales(blocks, scales, zero_points, grid.bits, importance, rounds=self.rounds)
        return rounding.assembled(rounding.encode(blocks, scales, zero_points, grid.bits), scales, zero_points)


def fit_scales(
    blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int, importance: Tensor, *, rounds: int
) -> Tensor:
    """Scales that lose no more than `scales`: least squares for the codes, then new codes, in turn."""
    import torch

    codes = rounding.encode(blocks, scales, zero_points, bits)
    least = rounding.error(blocks, codes, scales, zero_points, importance)
    for _ in range(rounds):
        trial = rounding.fitted(blocks, codes, scales, zero_points, importance)
        codes = rounding.encode(blocks, trial, zero_points, bits)
        lost = rounding.error(blocks, codes, trial, zero_points, importance)
        scales, least = torch.where(lost < least, trial, scales), torch.minimum(lost, least)
        codes = rounding.encode(blocks, scales, zero_points, bits)
    return scales
