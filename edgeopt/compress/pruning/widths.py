"""How wide the MLP of each layer becomes under one budget for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeopt.checkpoints.modeling import layers
from edgeopt.compress.allocation import allocate
from edgeopt.compress.losses import kl_divergence, log_probabilities
from edgeopt.compress.pruning.importance import output

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.protocols import Progress

SHARES = (0.1, 0.25, 0.45, 0.7, 1.0)
"""Shares of a layer's channels that are taken away to see what the model loses."""


def global_widths(scores: Sequence[Tensor], total: int, multiple: int) -> list[int]:
    """Widths that add up to `total` and keep the most important channels of all layers.

    Each layer's channels are taken in groups of `multiple` in order of importance; the groups of the highest
    scores are kept, one at least in every layer.
    """
    groups: list[tuple[float, int]] = []
    for number, score in enumerate(scores):
        whole = len(score) // multiple
        ranked = score.sort(descending=True).values[: whole * multiple]
        groups += [(value, number) for value in ranked.reshape(whole, multiple).sum(dim=1)[1:].tolist()]
    widths = [multiple] * len(scores)
    for _, number in sorted(groups, key=lambda g: -g[0])[: max(0, total // multiple - len(scores))]:
        widths[number] += multiple
    return widths


def sensitivities(
    network: PreTrainedModel, scores: Sequence[Tensor], windows: Sequence[Sequence[int]], progress: Progress
) -> list[list[float]]:
    """KL in nats a token after each layer alone lost each of `SHARES` of its channels, the least important ones.

    The network is left as it was. Returns one row a layer.
    """
    from torch import nn

    reference = log_probabilities(network, windows)
    found = []
    for number, (layer, score) in enumerate(zip(layers(network), scores, strict=True)):
        progress(f"measuring what narrower layers cost: layer {number + 1} of {len(scores)}")
        down, row = output(layer, "mlp"), []
        whole, order = down.weight, score.argsort()
        for share in SHARES:
            cut = whole.detach().clone()
            cut[:, order[: round(share * len(order))]] = 0.0
            down.weight = nn.Parameter(cut, requires_grad=False)
            row.append(kl_divergence(network, windows, reference))
        down.weight = whole
        found.append(row)
    return found


def least_divergent_widths(
    losses: Sequence[Sequence[float]], sizes: Sequence[int], total: int, multiple: int
) -> list[int]:
    """Widths that add up to `total`, and whose divergences, interpolated between `SHARES`, add up to the least.

    Args:
        losses: as `sensitivities` measures them.
        sizes: present widths. Every layer keeps at least one `multiple`.
    """
    import numpy as np

    curves: dict[str, dict[int, float]] = {}
    for number, (row, size) in enumerate(zip(losses, sizes, strict=True)):
        offered = range(multiple, size + 1, multiple)
        rising = np.maximum.accumulate([0.0, *row])
        lost = np.interp([1.0 - width / size for width in offered], (0.0, *SHARES), rising)
        curves[str(number)] = dict(zip(offered, lost.tolist(), strict=True))
    # a price for every channel left out is alike for all ways to use the whole budget, and more for all that do not
    price = max(max(curve.values()) for curve in curves.values()) / max(sizes) or 1.0
    chosen = allocate(
        [{layer: {width: width for width in curve} for layer, curve in curves.items()}],
        {
            layer: {width: lost + price * (max(sizes) - width) for width, lost in curve.items()}
            for layer, curve in curves.items()
        },
        [total],
    )
    return [chosen[layer] for layer in curves]
