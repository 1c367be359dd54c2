"""The time of a token where a part of the weights is read from storage for each, by arithmetic alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.result import Measurement
from edgeopt.runtimes.packed import packed_bytes
from edgeopt.spec import EMBEDDING, ModelSpec

if TYPE_CHECKING:
    from edgeopt.runtimes.portable import PortableOnnx
    from edgeopt.target import Device

DECODE = "latency/decode_p50_ms"
BAND = 0.3
"""Half the width of the band around a prediction, as a share of it, below which a limit refuses a recipe."""


def predictions(spec: ModelSpec, runtime: PortableOnnx, device: Device | None) -> tuple[Measurement, ...]:
    """What will be measured where storage is what bounds a token; nothing where that is not known."""
    if device is None or not device.storage_gb_per_s:
        return ()
    value = streamed_bytes(spec, runtime) / device.storage_gb_per_s / 1e6
    if not value:
        return ()
    return (
        Measurement(
            metric=DECODE,
            unit="ms",
            value=value,
            low=value * (1 - BAND),
            high=value * (1 + BAND),
            count=0,
            method=f"bytes that a token reads from storage, at {device.storage_gb_per_s:g} GB/s",
            kind="predicted",
        ),
    )


def streamed_bytes(spec: ModelSpec, runtime: PortableOnnx) -> int:
    """Bytes of weights that are read from storage for a token: all but as many whole shards as the budget holds.

    Nothing where all stay, or all but one shard, which has to be in memory to compute; and nothing where a token
    computes longer than it reads: weights on a grid that are not packed.
    """
    budget_bytes = runtime.resident_bytes
    if budget_bytes is None or runtime.processes > 1 or (spec.grids and not runtime.packed_on_disk):
        return 0
    size = packed_bytes if runtime.packed_on_disk else ModelSpec.size_bytes
    sizes = [size(spec, name) for name in spec.matrices if name != EMBEDDING]
    shard = sum(sizes) / runtime.shards
    streamed = round(sum(sizes) - budget_bytes // shard * shard)
    return streamed if streamed > max(shard, *sizes) else 0
