"""Comparing next-token distributions: log-probabilities, Kullback-Leibler divergence, agreement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.errors import MeasureError

if TYPE_CHECKING:
    import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, float32 with sums in float64.

    Raises MeasureError where a logit is not finite.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        raise MeasureError(
            "the engine returned logits that are not finite", hint="Compress less, or store fewer tensors in fp16"
        )
    shifted = np.asarray(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
    return shifted


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) in nats at each position, from log-probabilities of shape (positions, vocabulary)."""
    import numpy as np

    products = np.exp(reference)
    products *= reference - other
    return np.asarray(np.maximum(products.sum(axis=-1, dtype=np.float64), 0.0))


def top1_agreement(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether both give the same most probable token, at each position."""
    import numpy as np

    return np.asarray(reference.argmax(axis=-1) == other.argmax(axis=-1))


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """max |reference - other| / max |reference|."""
    import numpy as np

    return float(np.abs(reference - other).max() / np.abs(reference).max())
