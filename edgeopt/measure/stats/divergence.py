"""Compare next-token distributions: log-softmax, Kullback-Leibler divergence, top-1 agreement, relative error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.errors import MeasureError

if TYPE_CHECKING:
    import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log softmax over the last axis as float32; the sum of exponentials is accumulated in float64.

    Raises MeasureError if a logit is not finite.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        raise MeasureError(
            "the engine's logits must be finite, got NaN or infinity",
            hint="Compress less, or store fewer tensors in fp16",
        )
    shifted = np.asarray(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
    return shifted


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL(reference ‖ other) = sum p_ref (log p_ref - log p_other) in nats, shape (positions,).

    Both arguments are log-probabilities of shape (positions, vocabulary). Rounding below zero is clipped to 0.
    """
    import numpy as np

    products = np.exp(reference)
    products *= reference - other
    return np.asarray(np.maximum(products.sum(axis=-1, dtype=np.float64), 0.0))


def top1_agreement(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each position whether both distributions have the same argmax."""
    import numpy as np

    return np.asarray(reference.argmax(axis=-1) == other.argmax(axis=-1))


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """Return max |reference - other| / max |reference|."""
    import numpy as np

    return float(np.abs(reference - other).max() / np.abs(reference).max())
