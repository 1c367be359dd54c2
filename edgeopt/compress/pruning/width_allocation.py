"""Distribute a total number of MLP channels over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeopt.checkpoints.modeling import layers
from edgeopt.compress.allocation import allocate
from edgeopt.compress.losses import kl_divergence, log_probabilities
from edgeopt.compress.pruning.importance import output_projection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.protocols import Progress

PRUNED_SHARES = (0.1, 0.25, 0.45, 0.7, 1.0)
"""Shares of a layer's channels that are pruned to measure its sensitivity."""


def allocate_widths_globally(scores: Sequence[Tensor], total: int, multiple: int) -> list[int]:
    """Return the widths that sum to `total` and keep the most important channels of all layers.

    The channels of each layer are sorted by importance and grouped by `multiple`. The groups with the highest
    scores are kept, at least one in every layer.
    """
    candidates: list[tuple[float, int]] = []
    for index, channel_scores in enumerate(scores):
        groups = len(channel_scores) // multiple
        ranked = channel_scores.sort(descending=True).values[: groups * multiple]
        group_scores = ranked.reshape(groups, multiple).sum(dim=1).tolist()
        candidates += [(group_score, index) for group_score in group_scores[1:]]
    widths = [multiple] * len(scores)
    remaining = max(0, total // multiple - len(scores))
    for _, index in sorted(candidates, key=lambda candidate: -candidate[0])[:remaining]:
        widths[index] += multiple
    return widths


def measure_sensitivities(
    network: PreTrainedModel, scores: Sequence[Tensor], windows: Sequence[Sequence[int]], progress: Progress
) -> list[list[float]]:
    """Return the KL divergence in nats per token when one layer alone is pruned by each of `PRUNED_SHARES`.

    The least important channels of the layer are set to zero. The network is unchanged afterwards. The result has
    one row per layer and one column per share.
    """
    from torch import nn

    reference = log_probabilities(network, windows)
    rows = []
    for index, (layer, channel_scores) in enumerate(zip(layers(network), scores, strict=True)):
        progress(f"measuring width sensitivity of layer {index + 1} of {len(scores)}")
        projection, row = output_projection(layer, "mlp"), []
        original, ascending = projection.weight, channel_scores.argsort()
        for share in PRUNED_SHARES:
            pruned = original.detach().clone()
            pruned[:, ascending[: round(share * len(ascending))]] = 0.0
            projection.weight = nn.Parameter(pruned, requires_grad=False)
            row.append(kl_divergence(network, windows, reference))
        projection.weight = original
        rows.append(row)
    return rows


def allocate_widths_by_sensitivity(
    divergences: Sequence[Sequence[float]], sizes: Sequence[int], total: int, multiple: int
) -> list[int]:
    """Return the widths that sum to `total` and have the least total divergence.

    The divergence of a width is interpolated linearly between `PRUNED_SHARES`.

    Args:
        divergences: the result of `measure_sensitivities`.
        sizes: current width of each layer.
        total: sum of the new widths.
        multiple: unit of the new widths; every layer keeps at least this many channels.
    """
    import numpy as np

    curves: dict[str, dict[int, float]] = {}
    for index, (row, size) in enumerate(zip(divergences, sizes, strict=True)):
        widths = range(multiple, size + 1, multiple)
        increasing = np.maximum.accumulate([0.0, *row])
        interpolated = np.interp([1.0 - width / size for width in widths], (0.0, *PRUNED_SHARES), increasing)
        curves[str(index)] = dict(zip(widths, interpolated.tolist(), strict=True))
    # allocate() treats the budget as an upper bound. A penalty per pruned channel adds the same amount to every
    # allocation that uses the whole budget, and more to every other one, so that the whole budget is used.
    penalty = max(max(curve.values()) for curve in curves.values()) / max(sizes) or 1.0
    chosen = allocate(
        [{layer: {width: width for width in curve} for layer, curve in curves.items()}],
        {
            layer: {width: loss + penalty * (max(sizes) - width) for width, loss in curve.items()}
            for layer, curve in curves.items()
        },
        [total],
    )
    return [chosen[layer] for layer in curves]
