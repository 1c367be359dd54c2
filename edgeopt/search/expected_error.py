"""Estimate by arithmetic the share of the weights' energy (sum of squares) that a recipe loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import ErrorReducing, Step


def expected_error(steps: Sequence[Step], specs: Sequence[ModelSpec]) -> float:
    """Return the expected share of the weights' energy that the steps lose.

    A step that implements `ErrorReducing` scales its own error, or the error of earlier steps if it adds none. The
    estimate is rough: it orders recipes until trials provide better information.

    Args:
        steps: steps of the recipe.
        specs: planned models before the first step and after each step.
    """
    error = 0.0
    for step, (before, after) in zip(steps, pairwise(specs), strict=True):
        remaining_error = step.remaining_error if isinstance(step, ErrorReducing) else 1.0
        added = added_error(before, after)
        error = error + remaining_error * added if added else remaining_error * error
    return error


def added_error(before: ModelSpec, after: ModelSpec) -> float:
    """Return the share of energy lost between two models by pruning the least important channels and rounding.

    Pruning: with exponentially distributed channel importance, the least important share s of the channels holds
    s + (1 - s) ln(1 - s) of the total importance.

    Rounding to b bits in blocks of B weights loses (2/3) ln(2B) 4^-b. The largest of B normal weights is about
    m = sqrt(2 ln 2B) standard deviations, the step is 2m/2^b, and a uniform rounding error has the variance step²/12.
    """
    sizes = {name: math.prod(shape) for name, shape in before.matrices.items()}
    remaining = {name: math.prod(shape) for name, shape in after.matrices.items()}
    lost = sum(size * _pruned_importance(1 - remaining.get(name, 0) / size) for name, size in sizes.items())
    for name, scheme in after.schemes.items():
        if name not in before.schemes:
            lost += remaining[name] * min(1.0, 2 / 3 * math.log(2 * scheme.block_size) * 4.0**-scheme.bits)
    return lost / sum(sizes.values())


def _pruned_importance(share: float) -> float:
    return share + (1 - share) * math.log1p(-share) if 0 < share < 1 else max(0.0, share)
