"""Structured pruning of whole decoder layers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.pruning.block_influence import BlockInfluence
from edgeopt.compress.pruning.importance import Importance, require_scores
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneDepth:
    """Remove the `layers` decoder layers that matter least.

    They are removed one at a time, and those that are left are scored again after each.
    """

    layers: int = 1
    importance: Importance = field(default_factory=BlockInfluence)
    windows: int = 16
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        require_scores(self.importance, "layer")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_depth")
        if self.layers >= len(spec.layers):
            raise ConfigError(
                f"{self.layers} of {len(spec.layers)} layers cannot be removed",
                location="layers",
                hint=f"Give at most {len(spec.layers) - 1}",
            )
        return spec.with_layers(spec.layers[: -self.layers])

    def rounds(self, spec: ModelSpec, share: float) -> list[ModelSpec]:
        each = max(1, round(share * len(spec.layers)))
        early = range(each, self.layers, each)
        return [*(replace(self, layers=removed).plan(spec) for removed in early), self.plan(spec)]

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        return self.cut(checkpoint, self.plan(checkpoint.spec), directory, context)

    def cut(self, checkpoint: Checkpoint, goal: ModelSpec, directory: Path, context: CompressionContext) -> ModelSpec:
        network = modeling.load(checkpoint)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        kept = list(range(len(checkpoint.spec.layers)))
        while len(kept) > len(goal.layers):
            context.progress(f"scoring {len(kept)} layers, of which {len(goal.layers)} will stay")
            scores = [float(score) for score in self.importance.scores(network, windows, "layer")]
            weakest = scores.index(min(scores))
            del kept[weakest]
            modeling.keep_layers(network, [n for n in range(len(scores)) if n != weakest])
        spec = checkpoint.spec.with_layers(tuple(checkpoint.spec.layers[n] for n in kept))
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_depth.json").write_text(json.dumps({"kept_layers": kept}) + "\n")
        return spec
