"""Score channels by the energy that they add to the residual stream."""

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
class ActivationEnergy:
    """||x_c||² ||W[:, c]||² of a channel's activation and its outgoing weights (after FLAP, arXiv 2312.11983)."""

    STRUCTURES: ClassVar[tuple[Structure, ...]] = ("mlp", "attention")

    def score(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        energies = input_sum_of_squares(network, windows, lambda layer: output_projection(layer, structure))
        return [
            output_energy(energy, output_projection(layer, structure).weight)
            for energy, layer in zip(energies, layers(network), strict=True)
        ]


def output_energy(energy: Tensor, weight: Tensor) -> Tensor:
    """Return the energy that each channel adds to the output: Σ x_c² ||W[:, c]||², float64, shape (channels,).

    Args:
        energy: sum over tokens of the squared input, shape (channels,).
        weight: shape (hidden, channels).
    """
    return energy * weight.double().square().sum(dim=0)
