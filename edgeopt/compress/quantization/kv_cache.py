"""Quantize the key-value cache to 8 or 4 bits with calibrated scales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import adapters, modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_no_kv_cache, require_positive
from edgeopt.core.model_spec import KvCacheScheme
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """Store the key-value cache as integers; must be the last step of a recipe.

    Some key channels are large for all tokens, so keys lose less with one scale per channel (KIVI, arXiv
    2402.02750). Scales are constant, so values outside the calibrated range are clipped. The range covers the base
    model and each of its separate adapters.

    Attributes:
        bits: 8 or 4.
        per_channel: one scale per channel instead of one per tensor.
        percentile: percentage of the calibration values that the range contains, 50 to 100.
        windows, window_tokens: number and length of the calibration windows.
    """

    bits: Literal[8, 4] = 8
    per_channel: bool = True
    percentile: float = 100.0
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        if not 50.0 <= self.percentile <= 100.0:
            raise ConfigError(
                f"`percentile` must be between 50 and 100, got {self.percentile}",
                location="percentile",
                hint="Use a value such as 99.9",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with the KV cache scheme; raise ConfigError if it already has one."""
        require_no_kv_cache(spec, "a second kv_cache", hint="Remove one of the kv_cache steps")
        return replace(spec, kv_cache=KvCacheScheme(bits=self.bits, per_channel=self.per_channel))

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Link the checkpoint's files and write the scales of keys and values."""
        import torch

        network = modeling.load(checkpoint)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"calibrating the KV cache on {len(windows)} windows")
        limits = self._clipping_limits(network, windows)
        for adapter in checkpoint.spec.adapters:
            with adapters.attached(network, adapters.read(checkpoint.directory, adapter)):
                adapted_limits = self._clipping_limits(network, windows)
                limits = [torch.maximum(a, b) for a, b in zip(limits, adapted_limits, strict=True)]
        qmax = 2 ** (self.bits - 1)
        scales = [(limit / qmax).tolist() for limit in limits]
        scales_by_name = {"k_scales": scales[::2], "v_scales": scales[1::2]}
        modeling.link_checkpoint(checkpoint, directory)
        (directory / modeling.KV_CACHE).write_text(json.dumps({"qmax": qmax, "scales": scales_by_name}) + "\n")
        return self.plan(checkpoint.spec)

    def _clipping_limits(self, network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the clipping limits of each layer's keys and values, in the order k0, v0, k1, v1, …."""
        return [
            clipping_limit(values, self.percentile, per_channel=self.per_channel)
            for layer in cached_keys_and_values(network, windows)
            for values in layer
        ]


def cached_keys_and_values(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's cached keys (after rotary embedding) and values over all tokens.

    Both are float32 of shape (tokens, kv_heads · head_size).
    """
    import torch

    layers: list[tuple[list[Tensor], list[Tensor]]] = []
    with torch.inference_mode():
        for window in windows:
            cache = network.get_decoder()(torch.tensor([list(window)]), use_cache=True).past_key_values
            for index, layer in enumerate(cache.layers):
                if index == len(layers):
                    layers.append(([], []))
                for tensors, tensor in zip(layers[index], (layer.keys, layer.values), strict=True):
                    tensors.append(tensor[0].transpose(0, 1).flatten(1))
    return [(torch.cat(keys), torch.cat(values)) for keys, values in layers]


def clipping_limit(values: Tensor, percentile: float, *, per_channel: bool) -> Tensor:
    """Return the percentile of the magnitudes of `values`, at least 1e-6.

    Args:
        values: shape (tokens, channels).

    Returns:
        Shape (channels,) if `per_channel`, otherwise (1,).
    """
    import torch

    magnitudes = values.abs() if per_channel else values.abs().flatten()[:, None]
    rank = max(1, round(len(magnitudes) * percentile / 100))
    limit: Tensor = torch.kthvalue(magnitudes, rank, dim=0).values
    return limit.clamp(min=1e-6)
