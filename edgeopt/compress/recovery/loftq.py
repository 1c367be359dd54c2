"""The low-rank update that makes up for rounding best, from which an adapter on a rounded base starts.

LoftQ (arXiv 2310.08659) alternates between rounding W - up · down and refitting up · down to what was lost. Here the
rounded base is given, as several adapters share it, so this is one such fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.checkpoints.adapters import LowRank

if TYPE_CHECKING:
    from torch import Tensor


def nearest(residual: Tensor, rank: int) -> LowRank:
    """The update of `rank` nearest to `residual` (rows, columns) in squared error: its largest singular values
    (Eckart-Young), the root of each in either factor."""
    import torch

    left, values, right = torch.linalg.svd(residual, full_matrices=False)
    roots = values[:rank].sqrt()
    return LowRank(down=(roots[:, None] * right[:rank]).contiguous(), up=(left[:, :rank] * roots).contiguous())
