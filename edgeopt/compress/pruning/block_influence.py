"""Score decoder layers by the change of direction that they cause in the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compress.activations import block_influence
from edgeopt.compress.pruning.importance import Structure

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfluence:
    """1 - mean cosine similarity of a layer's input and output (ShortGPT, arXiv 2403.03853)."""

    STRUCTURES: ClassVar[tuple[Structure, ...]] = ("layer",)

    def score(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        import torch

        return [torch.tensor(value, dtype=torch.float64) for value in block_influence(network, windows)]
