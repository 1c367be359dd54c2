"""Prune the least important MLP channels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_float, require_positive, require_ratio
from edgeopt.compress.pruning.activation_energy import ActivationEnergy
from edgeopt.compress.pruning.importance import Importance, require_structure
from edgeopt.compress.pruning.width_allocation import (
    PRUNED_SHARES,
    allocate_widths_by_sensitivity,
    allocate_widths_globally,
    measure_sensitivities,
)
from edgeopt.core.config_objects import to_config
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWidth:
    """Remove the least important MLP channels.

    Attributes:
        ratio: share of the MLP channels to remove, between 0 and 1.
        distribution: how the removed channels are distributed over the layers. All values keep the same total number
            of channels.
            `uniform` prunes every layer by the same share.
            `global` ranks the channels of all layers together. The scores must be comparable across layers, as
            those of Taylor are.
            `sensitivity` measures the KL divergence of the predictions when each layer alone is pruned, once per
            model, and chooses the widths with the least total divergence.
        multiple: widths are rounded to the nearest multiple of this number. Kernels are fast at multiples of 32, and
            quantization blocks must divide the width.
        importance: score of the MLP channels.
        windows, window_tokens: number and length of the calibration windows. Sensitivities use one eighth of the
            windows.
    """

    ratio: float = 0.2
    distribution: Literal["uniform", "global", "sensitivity"] = "sensitivity"
    multiple: int = 32
    importance: Importance = field(default_factory=ActivationEnergy)
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        require_ratio(self.ratio, "ratio")
        for name in ("multiple", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        require_structure(self.importance, "mlp")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_width")
        require_dense(spec, "prune_width")
        return spec.with_layers(
            tuple(
                replace(layer, intermediate_size=self._pruned_width(layer.intermediate_size)) for layer in spec.layers
            )
        )

    def plan_rounds(self, spec: ModelSpec, round_ratio: float) -> list[ModelSpec]:
        count = math.ceil(self.ratio / round_ratio - 1e-9)
        intermediate = [replace(self, ratio=self.ratio * number / count).plan(spec) for number in range(1, count)]
        return [*intermediate, self.plan(spec)]

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        return self.prune_to(checkpoint, self.plan(checkpoint.spec), directory, context)

    def prune_to(
        self, checkpoint: Checkpoint, pruned_spec: ModelSpec, directory: Path, context: CompressionContext
    ) -> ModelSpec:
        network = modeling.load(checkpoint)
        modeling.require_separate_projections(network, "prune_width")
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"scoring channels on {len(windows)} windows of calibration text")
        scores = self.importance.score(network, windows, "mlp")
        widths = self._allocate_widths(network, checkpoint, pruned_spec, scores, windows, context)
        for layer, channel_scores, width in zip(modeling.layers(network), scores, widths, strict=True):
            modeling.keep_channels(layer.mlp, top_indices(channel_scores, width))
        spec = modeling.spec_of(network, checkpoint.spec)
        modeling.save(network, directory, checkpoint, spec)
        report = {
            "kept_channels": widths,
            "kept_importance": [
                _kept_importance(channel_scores, width) for channel_scores, width in zip(scores, widths, strict=True)
            ],
        }
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_width.json").write_text(json.dumps(report, indent=1) + "\n")
        return spec

    def _allocate_widths(
        self,
        network: PreTrainedModel,
        checkpoint: Checkpoint,
        pruned_spec: ModelSpec,
        scores: Sequence[Tensor],
        windows: Sequence[Sequence[int]],
        context: CompressionContext,
    ) -> list[int]:
        """Return the new width of each layer. They sum to the total width of `pruned_spec`."""
        uniform = [layer.intermediate_size for layer in pruned_spec.layers]
        if self.distribution == "uniform":
            return uniform
        if self.distribution == "global":
            return allocate_widths_globally(scores, sum(uniform), self.multiple)

        def produce(directory: Path) -> None:
            subset = windows[: max(1, len(windows) // 8)]
            divergences = measure_sensitivities(network, scores, subset, context.progress)
            (directory / "nats.json").write_text(json.dumps(divergences) + "\n")

        inputs = [
            checkpoint.digest,
            context.calibration.digest,
            to_config(self.importance),
            self.windows,
            self.window_tokens,
            PRUNED_SHARES,
        ]
        folder = context.cache.get_or_create("width_sensitivity", inputs, produce)
        divergences = json.loads((folder / "nats.json").read_text())
        sizes = [len(channel_scores) for channel_scores in scores]
        return allocate_widths_by_sensitivity(divergences, sizes, sum(uniform), self.multiple)

    def _pruned_width(self, intermediate_size: int) -> int:
        width = round(intermediate_size * (1.0 - self.ratio) / self.multiple) * self.multiple
        if not 0 < width < intermediate_size:
            raise ConfigError(
                f"`ratio` must remove some but not all of {intermediate_size} channels in multiples of "
                f"{self.multiple}, got {self.ratio}, which keeps {width}",
                location="ratio",
                hint="Use another ratio or a smaller multiple",
            )
        return width


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores in ascending order, int64, shape (count,)."""
    return scores.topk(count).indices.sort().values


def _kept_importance(channel_scores: Tensor, width: int) -> float:
    """Return the share of the total score that belongs to the `width` best channels."""
    return float(channel_scores.topk(width).values.sum() / channel_scores.sum())
