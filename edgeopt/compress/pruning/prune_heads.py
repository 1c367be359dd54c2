"""Structured pruning of whole key-value groups with their query heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_float, require_positive, require_ratio
from edgeopt.compress.pruning.activation_energy import ActivationEnergy
from edgeopt.compress.pruning.importance import Importance, require_scores
from edgeopt.compress.pruning.prune_width import most_important
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import LayerSpec, ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneHeads:
    """Remove the `ratio` of key-value groups whose heads matter least, as many in every layer.

    A group is one key-value head and the query heads that share it (grouped-query attention, arXiv
    2305.13245); head size and the ratio of query to key-value heads stay as they are. Runtimes keep one shape of
    key-value cache for all layers, so there is no other distribution.
    """

    ratio: float = 0.25
    importance: Importance = field(default_factory=ActivationEnergy)
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        require_ratio(self.ratio, "ratio")
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        require_scores(self.importance, "attention")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_heads")
        require_dense(spec, "prune_heads")
        return spec.with_layers(tuple(self._pruned(layer) for layer in spec.layers))

    def rounds(self, spec: ModelSpec, share: float) -> list[ModelSpec]:
        present, last = spec.layers[0].kv_heads, self.plan(spec)
        each = max(1, round(share * present))
        early = range(present - each, last.layers[0].kv_heads, -each)
        return [*(replace(self, ratio=1.0 - kept / present).plan(spec) for kept in early), last]

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        return self.cut(checkpoint, self.plan(checkpoint.spec), directory, context)

    def cut(self, checkpoint: Checkpoint, goal: ModelSpec, directory: Path, context: CompressionContext) -> ModelSpec:
        network = modeling.load(checkpoint)
        modeling.require_separate_projections(network, "prune_heads")
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"scoring heads on {len(windows)} windows of calibration text")
        scores = self.importance.scores(network, windows, "attention")
        for layer, score, sizes in zip(modeling.layers(network), scores, goal.layers, strict=True):
            keep_groups(layer.self_attn, score, sizes.kv_heads, goal.head_size)
        modeling.save(network, directory, checkpoint, goal)
        return goal

    def _pruned(self, layer: LayerSpec) -> LayerSpec:
        kept = round(layer.kv_heads * (1.0 - self.ratio))
        if not 0 < kept < layer.kv_heads:
            raise ConfigError(
                f"{self.ratio} of {layer.kv_heads} key-value heads leaves {kept}",
                location="ratio",
                hint=f"Give a multiple of {1 / layer.kv_heads:.3g}, or leave this step out",
            )
        return replace(layer, kv_heads=kept, heads=kept * (layer.heads // layer.kv_heads))


def keep_groups(attention: Any, score: Tensor, kv_heads: int, head_size: int) -> None:
    """Keep the `kv_heads` most important key-value groups, by `score` of the output projection's input channels."""
    groups: int = attention.num_key_value_groups
    kept = most_important(score.reshape(-1, groups * head_size).sum(dim=1), kv_heads)
    modeling.keep_heads(attention, expand(kept, groups * head_size), expand(kept, head_size), groups=groups)


def expand(groups: Tensor, size: int) -> Tensor:
    """Row numbers of consecutive blocks of `size` rows, one block for each number in `groups`."""
    import torch

    return (groups[:, None] * size + torch.arange(size)[None, :]).flatten()
