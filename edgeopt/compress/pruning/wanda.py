"""Score weights by the product of their magnitude and the norm of their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.checkpoints.modeling import layers
from edgeopt.compress.activations import input_sum_of_squares
from edgeopt.compress.pruning.importance import Structure, output_projection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda:
    """|W| ||x|| (Wanda, arXiv 2306.11695), summed over the outgoing weights of a channel."""

    STRUCTURES: ClassVar[tuple[Structure, ...]] = ("mlp", "attention")

    def score(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        energies = input_sum_of_squares(network, windows, lambda layer: output_projection(layer, structure))
        return [
            weight_importance(output_projection(layer, structure).weight, energy).sum(dim=0)
            for energy, layer in zip(energies, layers(network), strict=True)
        ]


def weight_importance(weight: Tensor, energy: Tensor) -> Tensor:
    """Return |W_rc| ||x_c|| of each weight, float64, shape (rows, columns).

    Args:
        weight: shape (rows, columns).
        energy: sum of x² over tokens, or their mean, shape (columns,).
    """
    return weight.detach().double().abs() * energy.sqrt()
