"""Structured pruning of MLP channels by their importance."""

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
from edgeopt.compress.pruning.importance import Importance, require_scores
from edgeopt.compress.pruning.widths import SHARES, global_widths, least_divergent_widths, sensitivities
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
    """Remove the `ratio` of MLP channels that matter least.

    Attributes:
        distribution: `sensitivity` measures what the predictions lose when each layer alone is cut, once a model,
            and finds the widths that lose least in sum; `global` ranks the channels of all layers together, which
            asks for scores in one unit (Taylor's); `uniform` cuts every layer alike. All leave as many channels.
        multiple: widths are rounded to the nearest multiple: kernels like 32, and blocks of quantization must fit.
        importance: what is taken for unimportant.
        windows, window_tokens: how much calibration text is read; an eighth of it for sensitivities.
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
        require_scores(self.importance, "mlp")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_width")
        require_dense(spec, "prune_width")
        return spec.with_layers(
            tuple(replace(layer, intermediate_size=self._width(layer.intermediate_size)) for layer in spec.layers)
        )

    def rounds(self, spec: ModelSpec, share: float) -> list[ModelSpec]:
        count = math.ceil(self.ratio / share - 1e-9)
        early = [replace(self, ratio=self.ratio * number / count).plan(spec) for number in range(1, count)]
        return [*early, self.plan(spec)]

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        return self.cut(checkpoint, self.plan(checkpoint.spec), directory, context)

    def cut(self, checkpoint: Checkpoint, goal: ModelSpec, directory: Path, context: CompressionContext) -> ModelSpec:
        network = modeling.load(checkpoint)
        modeling.require_separate_projections(network, "prune_width")
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"scoring channels on {len(windows)} windows of calibration text")
        scores = self.importance.scores(network, windows, "mlp")
        widths = self._widths(network, checkpoint, goal, scores, windows, context)
        for layer, score, width in zip(modeling.layers(network), scores, widths, strict=True):
            modeling.keep_channels(layer.mlp, most_important(score, width))
        spec = modeling.spec_of(network, checkpoint.spec)
        modeling.save(network, directory, checkpoint, spec)
        report = {
            "kept_channels": widths,
            "kept_importance": [_kept_share(s, w) for s, w in zip(scores, widths, strict=True)],
        }
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_width.json").write_text(json.dumps(report, indent=1) + "\n")
        return spec

    def _widths(
        self,
        network: PreTrainedModel,
        checkpoint: Checkpoint,
        goal: ModelSpec,
        scores: Sequence[Tensor],
        windows: Sequence[Sequence[int]],
        context: CompressionContext,
    ) -> list[int]:
        uniform = [layer.intermediate_size for layer in goal.layers]
        if self.distribution == "uniform":
            return uniform
        if self.distribution == "global":
            return global_widths(scores, sum(uniform), self.multiple)

        def measure(directory: Path) -> None:
            few = windows[: max(1, len(windows) // 8)]
            found = sensitivities(network, scores, few, context.progress)
            (directory / "nats.json").write_text(json.dumps(found) + "\n")

        inputs = [
            checkpoint.digest,
            context.calibration.digest,
            to_config(self.importance),
            self.windows,
            self.window_tokens,
            SHARES,
        ]
        losses = json.loads((context.cache.stage("width_sensitivity", inputs, measure) / "nats.json").read_text())
        return least_divergent_widths(losses, [len(score) for score in scores], sum(uniform), self.multiple)

    def _width(self, intermediate_size: int) -> int:
        width = round(intermediate_size * (1.0 - self.ratio) / self.multiple) * self.multiple
        if not 0 < width < intermediate_size:
            raise ConfigError(
                f"{self.ratio} of {intermediate_size} channels in multiples of {self.multiple} leaves {width}",
                location="ratio",
                hint="Give another ratio or a smaller multiple",
            )
        return width


def most_important(scores: Tensor, count: int) -> Tensor:
    """Numbers of the `count` highest scores, ascending; int64, shape (count,)."""
    return scores.topk(count).indices.sort().values


def _kept_share(score: Tensor, width: int) -> float:
    return float(score.topk(width).values.sum() / score.sum())
