"""Quantize a matrix column by column; later columns compensate for the error of earlier ones (GPTQ)."""

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
    """GPTQ (arXiv 2210.17323): column-by-column rounding with error compensation by the inverse Hessian.

    Scales and zero-points are fitted to the original matrix, weighted by the Hessian's diagonal, before any column
    is rounded ("static groups"). Blocks therefore stay contiguous for any column order.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to the diagonal.
        act_order: round columns in order of decreasing Hessian diagonal.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "hessian"
    REMAINING_ERROR: ClassVar[float] = 0.5
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ConfigError(
                f"`damping` must be between 0 and 1, got {self.damping}",
                location="damping",
                hint="Choose a small share such as 0.01",
            )

    def round(self, weight: Tensor, scheme: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        """Quantize `weight`; see `edgeopt.compress.quantization.rounding.Rounding`."""
        import torch

        assert statistic is not None
        blocks = rounding.to_blocks(weight, scheme.block_size)
        importance = rounding.channel_importance(statistic, blocks)
        scales, zero_points = rounding.search_scales(blocks, scheme, importance)
        scales = fit_scales(blocks, scales, zero_points, scheme.bits, importance, rounds=2)
        order, factor = ordered_cholesky(statistic, self.damping, self.act_order)
        block_index = order // scheme.block_size
        codes = torch.empty_like(weight)
        codes[:, order] = quantize_columns(
            weight[:, order],
            factor,
            scales[:, block_index],
            zero_points[:, block_index],
            scheme.bits,
        )
        return rounding.to_quantized_matrix(rounding.to_blocks(codes, scheme.block_size), scales, zero_points)


@lru_cache(maxsize=1)  # mixed precision quantizes one matrix with many schemes
def ordered_cholesky(hessian: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """Return the column order, int64 (columns,), and `inverse_hessian_cholesky` of the Hessian in this order."""
    import torch

    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    return order, inverse_hessian_cholesky(hessian[order][:, order], damping)


def quantize_columns(weight: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Return the codes of `weight`, rounded from the first column to the last (GPTQ, Algorithm 1).

    Args:
        weight: float32, shape (rows, columns).
        factor: U from `inverse_hessian_cholesky`, in the same column order.
        scales, zero_points: repeated for every column, shape (rows, columns).

    Returns:
        Integers as float32, shape (rows, columns).
    """
    import torch

    codes = torch.empty_like(weight)

    def round_to_nearest(column: int, remaining: Tensor) -> Tensor:
        scale, zero_point = scales[:, column], zero_points[:, column]
        codes[:, column] = ((remaining[:, 0] / scale).round() + zero_point).clamp(0, 2**bits - 1)
        return (codes[:, column] - zero_point) * scale

    replace_columns(weight, factor, round_to_nearest)
    return codes
