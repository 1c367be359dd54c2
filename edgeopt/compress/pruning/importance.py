"""Define the protocol of importance scores and the structures that they rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Structure = Literal["mlp", "attention", "layer"]
"""Structure that is pruned: MLP channels, channels of the attention output, or whole decoder layers."""
OUTPUT_PROJECTIONS = {"mlp": "mlp.down_proj", "attention": "self_attn.o_proj"}
"""Linear module by which each structure writes to the residual stream. Its input channels are pruned."""


class Importance(Protocol):
    """Score of the structures of a network; the lowest scores are pruned first."""

    STRUCTURES: ClassVar[tuple[Structure, ...]]
    """Structures that this score supports."""

    def score(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        """Return one float64 tensor of scores per layer, computed on windows of calibration text.

        The shape is (channels,), or () for whole layers. The score of a group of channels is the sum of its
        channels' scores. The network is unchanged afterwards.
        """
        ...


def output_projection(layer: Any, structure: Structure) -> Any:
    """Return the linear module by which `structure` of a decoder layer writes to the residual stream."""
    return layer.get_submodule(OUTPUT_PROJECTIONS[structure])


def require_structure(importance: Importance, structure: Structure) -> None:
    """Raise ConfigError if `importance` does not support `structure`."""
    if structure not in importance.STRUCTURES:
        raise ConfigError(
            f"`importance` must score the structure '{structure}', "
            f"got {type(importance).__name__}, which scores {' and '.join(importance.STRUCTURES)}",
            location="importance",
            hint="Use block_influence or taylor" if structure == "layer" else "Use activation, taylor or wanda",
        )
