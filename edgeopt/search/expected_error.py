"""How much a recipe is expected to change what a model predicts, by arithmetic before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import ErrorReducing, Step


def expected_error(steps: Sequence[Step], planned: Sequence[ModelSpec]) -> float:
    """The share of the weights' energy that is expected to be lost; `planned` are the specs before and after each step.

    A step that knows of a way to lose less, or to make good what was lost before it, says which share remains. All of
    it is rough: it orders recipes until trials tell better.
    """
    lost = 0.0
    for step, (before, after) in zip(steps, pairwise(planned), strict=True):
        remaining_error = step.remaining_error if isinstance(step, ErrorReducing) else 1.0
        done = added(before, after)
        lost = lost + remaining_error * done if done else remaining_error * lost
    return lost


def added(before: ModelSpec, after: ModelSpec) -> float:
    """What the plainest way from one model to the other loses: removing what matters least, rounding to nearest.

    Of a matrix's importance, where that of its channels is distributed exponentially, the least share s holds
    s + (1 - s) ln(1 - s). Rounding to b bits in blocks of B loses (2/3) ln(2B) 4^-b, the variance of a uniform error
    over steps of 2/2^b of the largest of B normal weights, sqrt(2 ln 2B) standard deviations.
    """
    sizes = {name: math.prod(sides) for name, sides in before.matrices.items()}
    left = {name: math.prod(sides) for name, sides in after.matrices.items()}
    lost = sum(size * _least(1 - left.get(name, 0) / size) for name, size in sizes.items())
    for name, grid in after.schemes.items():
        if name not in before.schemes:
            lost += left[name] * min(1.0, 2 / 3 * math.log(2 * grid.block_size) * 4.0**-grid.bits)
    return lost / sum(sizes.values())


def _least(share: float) -> float:
    return share + (1 - share) * math.log1p(-share) if 0 < share < 1 else max(0.0, share)
