"""Score structures by the first-order change of the loss when they are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.checkpoints.modeling import layers
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.pruning.importance import Structure, output_projection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Taylor:
    """First-order Taylor expansion of the language-modeling loss (arXiv 1906.10771, LLM-Pruner 2305.11627).

    Removing channel c sets its outgoing weights W[:, c] to zero, which changes the loss of a window by Σ_r g_rc W_rc
    to first order, where g is the gradient. The score is the absolute change, averaged over windows. The score of a
    layer is the sum over its channels. All scores are in nats and comparable across layers.
    """

    STRUCTURES: ClassVar[tuple[Structure, ...]] = ("mlp", "attention", "layer")

    def score(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        import torch

        parts: tuple[Structure, ...] = ("mlp", "attention") if structure == "layer" else (structure,)
        weights = [output_projection(layer, part).weight for layer in layers(network) for part in parts]
        loss = next_token_loss(windows)
        sums = [torch.zeros(weight.shape[1], dtype=torch.float64) for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        for index in range(len(windows)):
            gradients = torch.autograd.grad(loss(network, [index]), weights)
            for total, weight, gradient in zip(sums, weights, gradients, strict=True):
                total += (gradient * weight).detach().double().sum(dim=0).abs()
        for weight in weights:
            weight.requires_grad_(False)
        means = [total / len(windows) for total in sums]
        if structure != "layer":
            return means
        return [mlp.sum() + attention.sum() for mlp, attention in zip(means[::2], means[1::2], strict=True)]
