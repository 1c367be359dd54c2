"""Prune key-value heads together with the query heads that share them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_float, require_positive, require_ratio
from edgeopt.compress.pruning.activation_energy import ActivationEnergy
from edgeopt.compress.pruning.importance import Importance, require_structure
from edgeopt.compress.pruning.prune_width import top_indices
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import LayerSpec, ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneHeads:
    """Remove the least important key-value groups of every layer.

    A group is one key-value head and the query heads that share it (grouped-query attention, arXiv 2305.13245).
    The head size and the ratio of query to key-value heads do not change. Every layer keeps the same number of
    groups because runtimes use one key-value cache shape for all layers.

    Attributes:
        ratio: share of the key-value groups to remove, between 0 and 1.
        importance: score of the input channels of the attention output projection.
        windows, window_tokens: number and length of the calibration windows.
    """

    ratio: float = 0.25
    importance: Importance = field(default_factory=ActivationEnergy)
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        require_ratio(self.ratio, "ratio")
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        require_structure(self.importance, "attention")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_heads")
        require_dense(spec, "prune_heads")
        return spec.with_layers(tuple(self._prune_layer(layer) for layer in spec.layers))

    def plan_rounds(self, spec: ModelSpec, round_ratio: float) -> list[ModelSpec]:
        kv_heads, final_spec = spec.layers[0].kv_heads, self.plan(spec)
        heads_per_round = max(1, round(round_ratio * kv_heads))
        intermediate = range(kv_heads - heads_per_round, final_spec.layers[0].kv_heads, -heads_per_round)
        return [*(replace(self, ratio=1.0 - kept / kv_heads).plan(spec) for kept in intermediate), final_spec]

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        return self.prune_to(checkpoint, self.plan(checkpoint.spec), directory, context)

    def prune_to(
        self, checkpoint: Checkpoint, pruned_spec: ModelSpec, directory: Path, context: CompressionContext
    ) -> ModelSpec:
        network = modeling.load(checkpoint)
        modeling.require_separate_projections(network, "prune_heads")
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"scoring heads on {len(windows)} windows of calibration text")
        scores = self.importance.score(network, windows, "attention")
        for layer, channel_scores, sizes in zip(modeling.layers(network), scores, pruned_spec.layers, strict=True):
            keep_key_value_groups(layer.self_attn, channel_scores, sizes.kv_heads, pruned_spec.head_size)
        modeling.save(network, directory, checkpoint, pruned_spec)
        return pruned_spec

    def _prune_layer(self, layer: LayerSpec) -> LayerSpec:
        kept = round(layer.kv_heads * (1.0 - self.ratio))
        if not 0 < kept < layer.kv_heads:
            raise ConfigError(
                f"`ratio` must remove some but not all of {layer.kv_heads} key-value heads, "
                f"got {self.ratio}, which keeps {kept}",
                location="ratio",
                hint=f"Use a multiple of {1 / layer.kv_heads:.3g}, or omit this step",
            )
        return replace(layer, kv_heads=kept, heads=kept * (layer.heads // layer.kv_heads))


def keep_key_value_groups(attention: Any, channel_scores: Tensor, kv_heads: int, head_size: int) -> None:
    """Keep the `kv_heads` most important key-value groups of an attention module, in place.

    Args:
        channel_scores: scores of the output projection's input channels, shape (query heads · head_size,).
        kv_heads: number of groups to keep.
    """
    queries_per_group: int = attention.num_key_value_groups
    group_scores = channel_scores.reshape(-1, queries_per_group * head_size).sum(dim=1)
    kept = top_indices(group_scores, kv_heads)
    modeling.keep_heads(
        attention,
        block_row_indices(kept, queries_per_group * head_size),
        block_row_indices(kept, head_size),
        groups=queries_per_group,
    )


def block_row_indices(blocks: Tensor, block_size: int) -> Tensor:
    """Return the indices of all rows in `blocks`, int64, shape (len(blocks) · block_size,).

    Block b consists of the rows from b · block_size to (b + 1) · block_size - 1.
    """
    import torch

    return (blocks[:, None] * block_size + torch.arange(block_size)[None, :]).flatten()
