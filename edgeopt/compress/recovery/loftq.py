"""Compute the low-rank update that best compensates quantization error (LoftQ, arXiv 2310.08659).

LoftQ alternates between quantizing W - up · down and fitting up · down to the residual. Several adapters share one
quantized base here, so the base is fixed and a single fit suffices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.checkpoints.adapters import LowRankUpdate

if TYPE_CHECKING:
    from torch import Tensor


def truncated_svd(residual: Tensor, rank: int) -> LowRankUpdate:
    """Return the update of rank `rank` that is nearest to `residual` in squared error (Eckart-Young).

    It keeps the largest singular values. Both factors are scaled by their square roots.

    Args:
        residual: shape (rows, columns).
        rank: rank of the update, if neither side of `residual` is smaller.
    """
    import torch

    left, values, right = torch.linalg.svd(residual, full_matrices=False)
    roots = values[:rank].sqrt()
    return LowRankUpdate(down=(roots[:, None] * right[:rank]).contiguous(), up=(left[:, :rank] * roots).contiguous())
