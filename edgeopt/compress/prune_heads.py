"""Structured pruning of whole key-value groups with their query heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt import network as networks
from edgeopt.compress.activations import calibration_windows, input_energy
from edgeopt.compress.preconditions import require_float, require_positive, require_ratio
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Workshop
    from edgeopt.spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneHeads:
    """Remove the `ratio` of key-value groups whose heads add least to the attention's output.

    A group is one key-value head and the query heads that share it (grouped-query attention, arXiv
    2305.13245); head size and the ratio of query to key-value heads stay as they are.
    """

    ratio: float = 0.25
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        require_ratio(self.ratio, "ratio")
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_heads")
        return spec.with_layers(tuple(self._pruned(layer) for layer in spec.layers))

    def apply(self, checkpoint: Checkpoint, directory: Path, shop: Workshop) -> ModelSpec:
        network = networks.load(checkpoint)
        networks.require_separate_projections(network, "prune_heads")
        windows = calibration_windows(checkpoint, shop.calibration, count=self.windows, length=self.window_tokens)
        shop.progress(f"reading {len(windows)} shop.calibration windows")
        energies = input_energy(network, windows, lambda layer: layer.self_attn.o_proj)
        size = checkpoint.spec.head_size
        for layer, energy, sizes in zip(networks.layers(network), energies, checkpoint.spec.layers, strict=True):
            after = self._pruned(sizes)
            score = group_importance(energy, layer.self_attn.o_proj.weight, sizes.kv_heads)
            kept = score.topk(after.kv_heads).indices.sort().values
            groups = sizes.heads // sizes.kv_heads
            networks.keep_heads(layer.self_attn, expand(kept, groups * size), expand(kept, size), groups=groups)
        spec = networks.spec_of(network, checkpoint.spec)
        networks.save(network, directory, checkpoint, spec)
        return spec

    def _pruned(self, layer: LayerSpec) -> LayerSpec:
        kept = round(layer.kv_heads * (1.0 - self.ratio))
        if not 0 < kept < layer.kv_heads:
            raise ConfigError(
                f"{self.ratio} of {layer.kv_heads} key-value heads leaves {kept}",
                place="ratio",
                mend=f"Give a multiple of {1 / layer.kv_heads:.3g}, or leave this step out",
            )
        return replace(layer, kv_heads=kept, heads=kept * (layer.heads // layer.kv_heads))


def group_importance(energy: Tensor, output: Tensor, kv_heads: int) -> Tensor:
    """Energy that each key-value group adds to the attention's output, float64, shape (kv_heads,).

    Args:
        energy: sum over tokens of the squared input of the output projection, shape (heads * head_size,).
        output: weight of the output projection, shape (hidden, heads * head_size).
    """
    return (energy * output.double().square().sum(dim=0)).reshape(kv_heads, -1).sum(dim=1)


def expand(groups: Tensor, size: int) -> Tensor:
    """Row numbers of consecutive blocks of `size` rows, one block for each number in `groups`."""
    import torch

    return (groups[:, None] * size + torch.arange(size)[None, :]).flatten()
