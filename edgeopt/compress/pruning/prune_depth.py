"""Prune whole decoder layers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.pruning.block_influence import BlockInfluence
from edgeopt.compress.pruning.importance import Importance, require_structure
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneDepth:
    """Remove the `layers` least important decoder layers.

    Layers are removed one at a time. The remaining layers are scored again after each removal.

    Attributes:
        layers: number of layers to remove.
        importance: score of a layer; it must support whole layers.
        windows, window_tokens: number and length of the calibration windows that are scored.
    """

    layers: int = 1
    importance: Importance = field(default_factory=BlockInfluence)
    windows: int = 16
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        require_structure(self.importance, "layer")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_depth")
        if self.layers >= len(spec.layers):
            raise ConfigError(
                f"`layers` must be less than the model's {len(spec.layers)} layers, got {self.layers}",
                location="layers",
                hint=f"Use at most {len(spec.layers) - 1}",
            )
        return spec.with_layers(spec.layers[: -self.layers])

    def plan_rounds(self, spec: ModelSpec, round_ratio: float) -> list[ModelSpec]:
        layers_per_round = max(1, round(round_ratio * len(spec.layers)))
        intermediate = range(layers_per_round, self.layers, layers_per_round)
        return [*(replace(self, layers=removed).plan(spec) for removed in intermediate), self.plan(spec)]

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        return self.prune_to(checkpoint, self.plan(checkpoint.spec), directory, context)

    def prune_to(
        self, checkpoint: Checkpoint, pruned_spec: ModelSpec, directory: Path, context: CompressionContext
    ) -> ModelSpec:
        network = modeling.load(checkpoint)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        kept_layers = list(range(len(checkpoint.spec.layers)))
        while len(kept_layers) > len(pruned_spec.layers):
            context.progress(f"scoring {len(kept_layers)} layers, pruning to {len(pruned_spec.layers)}")
            scores = [float(score) for score in self.importance.score(network, windows, "layer")]
            weakest = scores.index(min(scores))
            del kept_layers[weakest]
            modeling.keep_layers(network, [index for index in range(len(scores)) if index != weakest])
        spec = checkpoint.spec.with_layers(tuple(checkpoint.spec.layers[index] for index in kept_layers))
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_depth.json").write_text(json.dumps({"kept_layers": kept_layers}) + "\n")
        return spec
