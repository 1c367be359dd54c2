"""GPTQ: each column's rounding error is made up for by the columns that are still to be rounded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compress.layerwise_forward import InputStatistic
from edgeopt.compress.optimal_brain import inverse_hessian_cholesky, replace_columns
from edgeopt.compress.quantization import rounding
from edgeopt.compress.quantization.k_quant import fit_scales
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.model_spec import QuantizationScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Optimal brain quantization a column at a time (GPTQ, arXiv 2210.17323).

    Scales and zero-points are chosen for the unrounded matrix, weighted by the Hessian's diagonal, so that
    columns may be taken in any order and the engine still reads plain blocks ("static groups").

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to it.
        act_order: round the columns with the most energy first.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "hessian"
    REMAINING_ERROR: ClassVar[float] = 0.5
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ConfigError(
                f"{self.damping} is outside its range", location="damping", hint="Give a share between 0 and 1"
            )

    def round(self, weight: Tensor, grid: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        import torch

        assert statistic is not None
        blocks = rounding.blocked(weight, grid.block_size)
        importance = rounding.weights_of(statistic, blocks)
        scales, zero_points = rounding.best(blocks, grid, importance)
        scales = fit_scales(blocks, scales, zero_points, grid.bits, importance, rounds=2)
        order, factor = ordered_factor(statistic, self.damping, self.act_order)
        block_of = order // grid.block_size
        codes = torch.empty_like(weight)
        codes[:, order] = compensated(
            weight[:, order],
            factor,
            scales[:, block_of],
            zero_points[:, block_of],
            grid.bits,
        )
        return rounding.assembled(rounding.blocked(codes, grid.block_size), scales, zero_points)


@lru_cache(maxsize=1)  # an allocation rounds a matrix on many grids
def ordered_factor(hessian: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The order in which columns are rounded, and the `inverse_factor` of the Hessian in this order."""
    import torch

    energy = hessian.diagonal()
    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(len(energy))
    return order, inverse_hessian_cholesky(hessian[order][:, order], damping)


def compensated(weight: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Codes of `weight`, float (rows, columns), rounded from the first column to the last.

    Args:
        factor: as `inverse_factor` gives it, in the order of the columns.
        scales, zero_points: of each single column, shape (rows, columns).
    """
    import torch

    codes = torch.empty_like(weight)

    def nearest(number: int, ahead: Tensor) -> Tensor:
        scale, zero = scales[:, number], zero_points[:, number]
        codes[:, number] = ((ahead[:, 0] / scale).round() + zero).clamp(0, 2**bits - 1)
        return (codes[:, number] - zero) * scale

    replace_columns(weight, factor, nearest)
    return codes
