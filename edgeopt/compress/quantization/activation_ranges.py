"""Compute 8-bit quantization parameters of activations from calibration values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RangeMethod = Literal["min_max", "percentile", "entropy"]
LEVELS, BINS = 256, 2048
EMPTY_BIN_PROBABILITY = 1e-9


def clipping_range(values: Tensor, method: RangeMethod, percentile: float) -> tuple[float, float]:
    """Return the lowest and highest representable value; values outside this range are clipped.

    `min_max` covers all values. `percentile` covers the values between the (100 - percentile)th and the percentile-th.
    `entropy` clips at the magnitude that `entropy_threshold` finds.
    """
    import numpy as np

    array = values.flatten().numpy()
    if method == "min_max":
        return float(array.min()), float(array.max())
    if method == "percentile":
        low, high = np.percentile(array, [100 - percentile, percentile])
        return float(low), float(high)
    threshold = entropy_threshold(values)
    return max(-threshold, float(array.min())), min(threshold, float(array.max()))


def affine_parameters(low: float, high: float, *, symmetric: bool) -> tuple[float, int]:
    """Return scale and zero-point of uint8 values for a range, which is extended to include zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(high, -low, 1e-12) / (LEVELS / 2 - 1), LEVELS // 2
    scale = max(high - low, 1e-12) / (LEVELS - 1)
    return scale, max(0, min(LEVELS - 1, round(-low / scale)))


def entropy_threshold(values: Tensor) -> float:
    """Return the clipping magnitude that minimizes KL(|values| ‖ |values| on 128 levels).

    It compares histograms of 2048 bins (Migacz, "8-bit Inference with TensorRT", GTC 2017).
    """
    import numpy as np

    magnitudes = values.flatten().abs().numpy()
    counts, edges = np.histogram(magnitudes, bins=BINS, range=(0.0, max(float(magnitudes.max()), 1e-12)))
    levels = LEVELS // 2
    best_bins, lowest = BINS, float("inf")
    for bins in range(levels, BINS + 1, levels // 4):
        clipped = counts[:bins].astype(float)
        clipped[-1] += counts[bins:].sum()
        divergence = _kl_divergence(clipped, _quantized_histogram(counts[:bins].astype(float), levels))
        if divergence < lowest:
            best_bins, lowest = bins, divergence
    return float(edges[best_bins])


def _quantized_histogram(counts: np.ndarray, levels: int) -> np.ndarray:
    """Return `counts` after quantization to `levels`: each level spreads its count evenly over its non-empty bins."""
    import numpy as np

    quantized = np.zeros_like(counts)
    for bins in np.array_split(np.arange(len(counts)), levels):
        nonempty = counts[bins] > 0
        if nonempty.any():
            quantized[bins] = nonempty * counts[bins].sum() / nonempty.sum()
    return quantized


def _kl_divergence(reference: np.ndarray, quantized: np.ndarray) -> float:
    """Return KL(reference ‖ quantized) of two histograms in nats.

    A bin that is empty only in `quantized` counts with EMPTY_BIN_PROBABILITY, so the result is large but finite.
    """
    import numpy as np

    nonempty = reference > 0
    p = reference[nonempty] / reference.sum()
    q = np.maximum(quantized[nonempty] / quantized.sum(), EMPTY_BIN_PROBABILITY)
    return float((p * np.log(p / q)).sum())
