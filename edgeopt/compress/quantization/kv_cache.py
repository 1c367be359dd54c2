"""Keys and values in 8 or 4 bits, with scales calibrated on text."""

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
    """Store the key-value cache in whole numbers; the last step of a recipe.

    Keys have channels that are large throughout, so scales by channel serve them better (KIVI, arXiv
    2402.02750). Scales are constant: what lies outside the calibrated range is clipped. The range is that of the base
    and of every adapter beside it.

    Attributes:
        percentile: share of calibration values that the range covers, in percent; 100 clips none of them.
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
                f"{self.percentile} is outside its range", location="percentile", hint="Give 50 to 100, such as 99.9"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_no_kv_cache(spec, "a second kv_cache")
        return replace(spec, kv_cache=KvCacheScheme(bits=self.bits, per_channel=self.per_channel))

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        network = modeling.load(checkpoint)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"reading {len(windows)} calibration windows")
        widest = self._widest(network, windows)
        for adapter in checkpoint.spec.adapters:
            with adapters.attached(network, adapters.read(checkpoint.directory, adapter)):
                widest = [torch.maximum(a, b) for a, b in zip(widest, self._widest(network, windows), strict=True)]
        largest = 2 ** (self.bits - 1)
        scales = [(values / largest).tolist() for values in widest]
        rows = {"k_scales": scales[::2], "v_scales": scales[1::2]}
        modeling.link(checkpoint, directory)
        (directory / modeling.KV_CACHE).write_text(json.dumps({"qmax": largest, "scales": rows}) + "\n")
        return self.plan(checkpoint.spec)

    def _widest(self, network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The range of each layer's keys, then values, as they are cached."""
        return [
            ranges(values, self.percentile, per_channel=self.per_channel)
            for layer in collected(network, windows)
            for values in layer
        ]


def collected(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Keys (after rotation) and values of each layer over all tokens, float32 (tokens, heads * head size)."""
    import torch

    found: list[tuple[list[Tensor], list[Tensor]]] = []
    with torch.inference_mode():
        for window in windows:
            cache = network.get_decoder()(torch.tensor([list(window)]), use_cache=True).past_key_values
            for number, layer in enumerate(cache.layers):
                if number == len(found):
                    found.append(([], []))
                for kept, tensor in zip(found[number], (layer.keys, layer.values), strict=True):
                    kept.append(tensor[0].transpose(0, 1).flatten(1))
    return [(torch.cat(keys), torch.cat(values)) for keys, values in found]


def ranges(values: Tensor, percentile: float, *, per_channel: bool) -> Tensor:
    """Largest magnitude that is represented, of each channel or (one element) of the tensor; never zero."""
    import torch

    sizes = values.abs() if per_channel else values.abs().flatten()[:, None]
    rank = max(1, round(len(sizes) * percentile / 100))
    bounds: Tensor = torch.kthvalue(sizes, rank, dim=0).values
    return bounds.clamp(min=1e-6)
