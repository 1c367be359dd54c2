"""Bytes of an engine's weights, and the figures that arithmetic gives before one is built."""

from __future__ import annotations

from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec
from edgeopt.core.result import Measurement
from edgeopt.runtimes.onnxruntime_common.prepacked_weights import packed_bytes

SIZE = "size/engine_mib"
_SHARE, _PAGES_BYTES = 0.05, 8192
"""By how much packed weights may differ from what the layout says: of their size, and as pages are filled up."""


def predicted(
    metric: str, unit: str, value: float, *, low: float, high: float, method: str = "by arithmetic"
) -> Measurement:
    """A figure that nothing measured. It lies between `low` and `high`, which limits are judged by."""
    return Measurement(
        metric=metric, unit=unit, value=value, low=low, high=high, count=0, method=method, kind="predicted"
    )


def about(metric: str, unit: str, value: float, *, share: float, method: str = "by arithmetic") -> Measurement:
    """A figure that may be off by a share of itself."""
    return predicted(metric, unit, value, low=value * (1 - share), high=value * (1 + share), method=method)


def size(value_bytes: float, *, low_bytes: float, high_bytes: float) -> Measurement:
    """All files of an engine."""
    return predicted(SIZE, "MiB", value_bytes / 2**20, low=low_bytes / 2**20, high=high_bytes / 2**20)


def size_of(
    spec: ModelSpec, weights_bytes: float, *, unsure_bytes: float, names_bytes: float, times: int, carried_bytes: int
) -> Measurement:
    """All files of an engine whose weights are known better than what describes them.

    Args:
        unsure_bytes: by which the weights may take more or less.
        names_bytes: what names, shapes and vocabulary about take. They may take nothing, so that no limit is broken by
            them alone, or `times` as much.
    """
    known_bytes = weights_bytes + carried_bytes + adapters_bytes(spec)
    return size(
        known_bytes + names_bytes,
        low_bytes=known_bytes - unsure_bytes,
        high_bytes=known_bytes + unsure_bytes + times * names_bytes,
    )


def adapters_bytes(spec: ModelSpec) -> int:
    """Bytes of all adapters that stand beside the weights."""
    return sum(map(spec.adapter_bytes, spec.adapters))


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of all decoder layers and the last norm, in families whose MLPs are gated."""
    matrices = sum(spec.size_bytes(name) for name in spec.matrices if name not in (LM_HEAD, EMBEDDING))
    return matrices + 4 * spec.hidden_size * (2 * len(spec.layers) + 1)


def table_bytes(spec: ModelSpec) -> int:
    """Bytes of embedding and lm_head, stored once where they are tied."""
    return spec.size_bytes(LM_HEAD) + (0 if spec.tied_embeddings else spec.size_bytes(EMBEDDING))


def packed_on_disk_bytes(spec: ModelSpec) -> int:
    """Bytes that all matrices take once more beside themselves in the layout of the kernels."""
    return sum(packed_bytes(spec, name) for name in spec.matrices if name != EMBEDDING)


def packed_error_bytes(spec: ModelSpec) -> float:
    """By how many bytes `packed_on_disk_bytes` may be off."""
    return _SHARE * packed_on_disk_bytes(spec) + _PAGES_BYTES * len(spec.matrices)
