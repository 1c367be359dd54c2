"""Compute the bytes of an engine's weights from its spec, and build predicted measurements from them."""

from __future__ import annotations

from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.runtimes.onnxruntime_common.prepacked_weights import prepacked_bytes

SIZE_METRIC = "size/engine_mib"
_PREPACKED_TOLERANCE = 0.05
"""Maximum relative error of the computed size of prepacked weights."""
_PADDING_BYTES = 8192
"""Bytes that aligning a prepacked matrix to memory pages may add."""


def make_prediction(
    metric: str, unit: str, value: float, *, low: float, high: float, method: str = "by arithmetic"
) -> Measurement:
    """Return a predicted measurement. Limits are compared with its bounds `low` and `high`."""
    return Measurement(
        metric=metric, unit=unit, value=value, low=low, high=high, count=0, method=method, kind="predicted"
    )


def make_prediction_within(
    metric: str, unit: str, value: float, *, tolerance: float, method: str = "by arithmetic"
) -> Measurement:
    """Return a predicted measurement with bounds at `value` · (1 ± `tolerance`)."""
    low, high = value * (1 - tolerance), value * (1 + tolerance)
    return make_prediction(metric, unit, value, low=low, high=high, method=method)


def predict_size(size_bytes: float, *, low_bytes: float, high_bytes: float) -> Measurement:
    """Return the predicted size of all files of an engine."""
    return make_prediction(SIZE_METRIC, "MiB", size_bytes / 2**20, low=low_bytes / 2**20, high=high_bytes / 2**20)


def predict_size_from_weights(
    spec: ModelSpec,
    weights_bytes: float,
    *,
    weights_error_bytes: float,
    metadata_bytes: float,
    max_metadata_factor: int,
    copied_bytes: int,
) -> Measurement:
    """Return the predicted size of all files of an engine whose metadata is known less precisely than its weights.

    Args:
        weights_error_bytes: maximum absolute error of `weights_bytes`.
        metadata_bytes: typical size of names, shapes and vocabulary. The lower bound assumes 0, so that metadata alone
            never exceeds a limit.
        max_metadata_factor: the upper bound assumes this multiple of `metadata_bytes`.
        copied_bytes: size of the files copied from the model, such as the tokenizer.
    """
    known_bytes = weights_bytes + copied_bytes + adapters_bytes(spec)
    return predict_size(
        known_bytes + metadata_bytes,
        low_bytes=known_bytes - weights_error_bytes,
        high_bytes=known_bytes + weights_error_bytes + max_metadata_factor * metadata_bytes,
    )


def adapters_bytes(spec: ModelSpec) -> int:
    """Return the bytes of all adapters that are not merged into the weights."""
    return sum(map(spec.adapter_bytes, spec.adapters))


def decoder_bytes(spec: ModelSpec) -> int:
    """Return the bytes of all decoder layers and the final norm in families with gated MLPs."""
    matrices = sum(spec.size_bytes(name) for name in spec.matrices if name not in (LM_HEAD, EMBEDDING))
    return matrices + 4 * spec.hidden_size * (2 * len(spec.layers) + 1)


def embedding_and_lm_head_bytes(spec: ModelSpec) -> int:
    """Return the bytes of embedding and lm_head, which count once if they are tied."""
    return spec.size_bytes(LM_HEAD) + (0 if spec.tied_embeddings else spec.size_bytes(EMBEDDING))


def prepacked_copy_bytes(spec: ModelSpec) -> int:
    """Return the bytes that a prepacked copy of all matrices except the embedding adds to the engine."""
    return sum(prepacked_bytes(spec, name) for name in spec.matrices if name != EMBEDDING)


def prepacked_copy_error_bytes(spec: ModelSpec) -> float:
    """Return the maximum absolute error of `prepacked_copy_bytes`."""
    return _PREPACKED_TOLERANCE * prepacked_copy_bytes(spec) + _PADDING_BYTES * len(spec.matrices)
