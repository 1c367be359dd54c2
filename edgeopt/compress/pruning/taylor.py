"""Importance by gradients: how much the loss would change, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.checkpoints.modeling import layers
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.pruning.importance import Structure, output

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Taylor:
    """First-order Taylor expansion of the loss of language modelling (arXiv 1906.10771, LLM-Pruner 2305.11627).

    Without a channel its outgoing weights are zero, and the loss of a window changes by Σ_r g_rc W_rc to first
    order, g the gradient: its size is averaged over windows. A layer scores the sum of its channels. Scores of
    different layers are in one unit, nats.
    """

    STRUCTURES: ClassVar[tuple[Structure, ...]] = ("mlp", "attention", "layer")

    def scores(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        import torch

        parts: tuple[Structure, ...] = ("mlp", "attention") if structure == "layer" else (structure,)
        weights = [output(layer, part).weight for layer in layers(network) for part in parts]
        loss = next_token_loss(windows)
        sums = [torch.zeros(weight.shape[1], dtype=torch.float64) for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        for number in range(len(windows)):
            gradients = torch.autograd.grad(loss(network, [number]), weights)
            for total, weight, gradient in zip(sums, weights, gradients, strict=True):
                total += (gradient * weight).detach().double().sum(dim=0).abs()
        for weight in weights:
            weight.requires_grad_(False)
        means = [total / len(windows) for total in sums]
        if structure != "layer":
            return means
        return [mlp.sum() + attention.sum() for mlp, attention in zip(means[::2], means[1::2], strict=True)]
