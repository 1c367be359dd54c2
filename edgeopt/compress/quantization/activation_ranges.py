"""Ranges of activations for 8 bits: from the values that calibration text produces, to a scale and a zero-point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Method = Literal["min_max", "percentile", "entropy"]
LEVELS, BINS = 256, 2048
EMPTY = 1e-9


def bounds(values: Tensor, method: Method, percentile: float) -> tuple[float, float]:
    """The range that is represented; what lies outside is clipped.

    `min_max` covers all values, `percentile` all but the rarest at each end, `entropy` clips both ends to the
    magnitude at which the rounded distribution diverges least (Migacz, 8-bit inference with TensorRT, 2017).
    """
    import numpy as np

    array = values.flatten().numpy()
    if method == "min_max":
        return float(array.min()), float(array.max())
    if method == "percentile":
        low, high = np.percentile(array, [100 - percentile, percentile])
        return float(low), float(high)
    limit = entropy_limit(values)
    return max(-limit, float(array.min())), min(limit, float(array.max()))


def affine(low: float, high: float, *, symmetric: bool) -> tuple[float, int]:
    """Scale and zero-point of unsigned 8-bit numbers for a range, which is widened to hold zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(high, -low, 1e-12) / (LEVELS / 2 - 1), LEVELS // 2
    scale = max(high - low, 1e-12) / (LEVELS - 1)
    return scale, max(0, min(LEVELS - 1, round(-low / scale)))


def entropy_limit(values: Tensor) -> float:
    """The magnitude to clip at, so that 128 levels of |values| diverge least from them."""
    import numpy as np

    sizes = values.flatten().abs().numpy()
    counts, edges = np.histogram(sizes, bins=BINS, range=(0.0, max(float(sizes.max()), 1e-12)))
    levels = LEVELS // 2
    best, least = BINS, float("inf")
    for kept in range(levels, BINS + 1, levels // 4):
        clipped = counts[:kept].astype(float)
        clipped[-1] += counts[kept:].sum()
        lost = _divergence(clipped, _leveled(counts[:kept].astype(float), levels))
        if lost < least:
            best, least = kept, lost
    return float(edges[best])


def _leveled(counts: np.ndarray, levels: int) -> np.ndarray:
    """Counts as `levels` equal steps would show them: each step's count spread over its bins that hold anything."""
    import numpy as np

    spread = np.zeros_like(counts)
    for part in np.array_split(np.arange(len(counts)), levels):
        filled = counts[part] > 0
        if filled.any():
            spread[part] = filled * counts[part].sum() / filled.sum()
    return spread


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected ‖ found) of two histograms in nats; a bin that is empty in `found` alone costs much, but not all."""
    import numpy as np

    filled = expected > 0
    p, q = expected[filled] / expected.sum(), np.maximum(found[filled] / found.sum(), EMPTY)
    return float((p * np.log(p / q)).sum())
