"""Replace a matrix column by column with the Optimal Brain Surgeon update.

GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774) share this update and differ in the replacement values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAZY_BATCH_COLUMNS = 128
"""Columns whose updates are collected before they reach the rest of the matrix (GPTQ, "lazy batch updates")."""


def inverse_hessian_cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor U of the damped inverse Hessian, H⁻¹ = Uᵀ U.

    The diagonal entry of a channel that is zero for all tokens is replaced with the mean of the diagonal.

    Args:
        hessian: E[x xᵀ], float64, shape (columns, columns).
        damping: multiple of the mean of the diagonal that is added to the diagonal.

    Returns:
        float32, shape (columns, columns).
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


def replace_columns(weight: Tensor, factor: Tensor, replacement: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Replace every column of `weight` in order; later columns compensate for the error of each replacement.

    After column q is replaced by ŵ_q, every later column j becomes w_j - (w_q - ŵ_q) / U_qq · U_qj
    (GPTQ, Algorithm 1).

    Args:
        weight: float32, shape (rows, columns).
        factor: U from `inverse_hessian_cholesky`, in the same column order.
        replacement: called with a column index and the updated columns from that index to the end of its batch of
            `LAZY_BATCH_COLUMNS`, shape (rows, remaining); returns the new column, shape (rows,).

    Returns:
        The replaced matrix, shape (rows, columns).
    """
    import torch

    updated, replaced = weight.clone(), torch.empty_like(weight)
    columns = updated.shape[1]
    for start in range(0, columns, LAZY_BATCH_COLUMNS):
        end = min(start + LAZY_BATCH_COLUMNS, columns)
        errors = torch.empty(updated.shape[0], end - start)
        batch = updated[:, start:end]
        batch_factor = factor[start:end, start:end]
        for i in range(end - start):
            replaced[:, start + i] = replacement(start + i, batch[:, i:])
            errors[:, i] = (batch[:, i] - replaced[:, start + i]) / batch_factor[i, i]
            batch[:, i + 1 :] -= errors[:, i, None] * batch_factor[i, i + 1 :]
        updated[:, end:] -= errors @ factor[start:end, end:]
    return replaced
