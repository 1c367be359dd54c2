"""GPTQ: each column's rounding error is made up for by the columns that are still to be rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compress import rounding
from edgeopt.compress.k_quant import fit_scales
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.grid import Rounded
    from edgeopt.spec import Grid

LAZY = 128
"""Columns whose corrections are gathered before they are applied to the rest of the matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Optimal brain quantization a column at a time (GPTQ, arXiv 2210.17323).

    Scales and zero-points are chosen for the unrounded matrix, weighted by the Hessian's diagonal, so that
    columns may be taken in any order and the engine still reads plain blocks ("static groups").

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to it.
        act_order: round the columns with the most energy first.
    """

    STATISTIC: ClassVar[rounding.Statistic] = "hessian"
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ConfigError(
                f"{self.damping} is outside its range", place="damping", mend="Give a share between 0 and 1"
            )

    def round(self, weight: Tensor, grid: Grid, statistic: Tensor | None) -> Rounded:
        import torch

        assert statistic is not None
        blocks = rounding.blocked(weight, grid.block_size)
        importance = rounding.weights_of(statistic, blocks)
        scales, zero_points = rounding.best(blocks, grid, importance)
        scales = fit_scales(blocks, scales, zero_points, grid.bits, importance, rounds=2)
        energy = statistic.diagonal()
        order = torch.argsort(energy, descending=True, stable=True) if self.act_order else torch.arange(len(energy))
        block_of = order // grid.block_size
        codes = torch.empty_like(weight)
        codes[:, order] = compensated(
            weight[:, order],
            inverse_factor(statistic[order][:, order], self.damping),
            scales[:, block_of],
            zero_points[:, block_of],
            grid.bits,
        )
        return rounding.assembled(rounding.blocked(codes, grid.block_size), scales, zero_points)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse Hessian, H⁻¹ = Uᵀ U, float32 (columns, columns).

    Channels that are always zero get the mean diagonal in place of their own.
    """
    import torch

    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean().clamp(min=1e-12)
    diagonal.masked_fill_(diagonal == 0, float(mean))
    diagonal += damping * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


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

    in_turn(weight, factor, nearest)
    return codes


def in_turn(weight: Tensor, factor: Tensor, replaced: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`weight`, (rows, columns), with one column after another replaced, and those after it making up for the error.

    Args:
        factor: as `inverse_factor` gives it, in the order of the columns.
        replaced: is called with a column's number and the columns from it to the end of its block of `LAZY`, as
            corrected so far; returns what stands in the column's place, shape (rows,).
    """
    import torch

    work, found = weight.clone(), torch.empty_like(weight)
    columns = work.shape[1]
    for start in range(0, columns, LAZY):
        end = min(start + LAZY, columns)
        lost = torch.empty(work.shape[0], end - start)
        part = work[:, start:end]
        inner = factor[start:end, start:end]
        for i in range(end - start):
            found[:, start + i] = replaced(start + i, part[:, i:])
            lost[:, i] = (part[:, i] - found[:, start + i]) / inner[i, i]
            part[:, i + 1 :] -= lost[:, i, None] * inner[i, i + 1 :]
        work[:, end:] -= lost @ factor[start:end, end:]
    return found
