"""Structured pruning of MLP channels by activation-aware importance."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt import network as networks
from edgeopt.compress.activations import calibration_windows, input_energy
from edgeopt.compress.preconditions import require_float, require_positive, require_ratio
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Workshop
    from edgeopt.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWidth:
    """Remove the `ratio` of MLP channels that contribute least to the MLP's output.

    A channel's importance is the energy it adds to the output: ||x_c||² ||W_down[:, c]||², after the
    activation statistics of FLAP (arXiv 2312.11983) and Wanda (arXiv 2306.11695).

    Attributes:
        distribution: `uniform` cuts every layer alike; `global` ranks the channels of all layers together,
            each by its share of its layer's energy, and keeps at least one multiple in every layer.
        multiple: widths are rounded to the nearest multiple, as kernels like them.
        windows, window_tokens: how much calibration text is read.
    """

    ratio: float = 0.2
    distribution: Literal["uniform", "global"] = "uniform"
    multiple: int = 32
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        require_ratio(self.ratio, "ratio")
        for name in ("multiple", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_width")
        return spec.with_layers(
            tuple(replace(layer, intermediate_size=self._width(layer.intermediate_size)) for layer in spec.layers)
        )

    def apply(self, checkpoint: Checkpoint, directory: Path, shop: Workshop) -> ModelSpec:
        import torch

        network = networks.load(checkpoint)
        networks.require_separate_projections(network, "prune_width")
        windows = calibration_windows(checkpoint, shop.calibration, count=self.windows, length=self.window_tokens)
        shop.progress(f"reading {len(windows)} shop.calibration windows")
        energies = input_energy(network, windows, lambda layer: layer.mlp.down_proj)
        scores = [
            channel_importance(energy, layer.mlp.down_proj.weight)
            for energy, layer in zip(energies, networks.layers(network), strict=True)
        ]
        widths = [self._width(len(s)) for s in scores]
        if self.distribution == "global":
            widths = global_widths(scores, sum(widths), self.multiple)
        for layer, score, width in zip(networks.layers(network), scores, widths, strict=True):
            kept = torch.topk(score, width).indices.sort().values
            networks.keep_channels(layer.mlp, kept)
        spec = networks.spec_of(network, checkpoint.spec)
        networks.save(network, directory, checkpoint, spec)
        report = {
            "kept_channels": widths,
            "kept_energy": [_kept_share(s, w) for s, w in zip(scores, widths, strict=True)],
        }
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_width.json").write_text(json.dumps(report, indent=1) + "\n")
        return spec

    def _width(self, intermediate_size: int) -> int:
        width = round(intermediate_size * (1.0 - self.ratio) / self.multiple) * self.multiple
        if not 0 < width < intermediate_size:
            raise ConfigError(
                f"{self.ratio} of {intermediate_size} channels in multiples of {self.multiple} leaves {width}",
                place="ratio",
                mend="Give another ratio or a smaller multiple",
            )
        return width


def channel_importance(energy: Tensor, down: Tensor) -> Tensor:
    """Energy that each MLP channel adds to the output: E[x_c²] ||W[:, c]||², float64, shape (channels,).

    Args:
        energy: sum over tokens of the squared input of the down projection, shape (channels,).
        down: weight of the down projection, shape (hidden, channels).
    """
    return energy * down.double().square().sum(dim=0)


def global_widths(scores: list[Tensor], total: int, multiple: int) -> list[int]:
    """Widths that add up to about `total`, where layers that spread their energy keep more channels.

    Channels are taken in groups of `multiple` in order of importance; each group is worth its share of its
    layer's energy, and the most valuable groups of all layers are kept, one at least in every layer.
    """
    groups: list[tuple[float, int]] = []
    widths = []
    for number, score in enumerate(scores):
        ranked = (score / score.sum()).sort(descending=True).values
        whole = len(ranked) // multiple
        blocks = ranked[: whole * multiple].reshape(whole, multiple).sum(dim=1).tolist()
        widths.append(multiple)
        groups += [(value, number) for value in blocks[1:]]
    for _, number in sorted(groups, key=lambda g: -g[0])[: max(0, total // multiple - len(scores))]:
        widths[number] += multiple
    return widths


def _kept_share(score: Tensor, width: int) -> float:
    return float(score.topk(width).values.sum() / score.sum())
