"""The optimal brain surgeon a column at a time: what GPTQ (arXiv 2210.17323) and SparseGPT (2301.00774) share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAZY_BATCH_COLUMNS = 128
"""Columns whose corrections are gathered before they are applied to the rest of the matrix."""


def inverse_hessian_cholesky(hessian: Tensor, damping: float) -> Tensor:
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


def replace_columns_in_order(weight: Tensor, factor: Tensor, replaced: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`weight`, (rows, columns), with one column after another replaced, and those after it making up for the error.

    Args:
        factor: as `inverse_factor` gives it, in the order of the columns.
        replaced: is called with a column's number and the columns from it to the end of its block of `LAZY`, as
            corrected so far; returns what stands in the column's place, shape (rows,).
    """
    import torch

    work, found = weight.clone(), torch.empty_like(weight)
    columns = work.shape[1]
    for start in range(0, columns, LAZY_BATCH_COLUMNS):
        end = min(start + LAZY_BATCH_COLUMNS, columns)
        lost = torch.empty(work.shape[0], end - start)
        part = work[:, start:end]
        inner = factor[start:end, start:end]
        for i in range(end - start):
            found[:, start + i] = replaced(start + i, part[:, i:])
            lost[:, i] = (part[:, i] - found[:, start + i]) / inner[i, i]
            part[:, i + 1 :] -= lost[:, i, None] * inner[i, i + 1 :]
        work[:, end:] -= lost @ factor[start:end, end:]
    return found
