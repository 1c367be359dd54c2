"""What scores for pruning share: the port, and where the structures that can be cut add to the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Structure = Literal["mlp", "attention", "layer"]
"""What is cut: channels of an MLP, channels of the attention's output, or whole layers."""
OUTPUTS = {"mlp": "mlp.down_proj", "attention": "self_attn.o_proj"}
"""The matrix of a decoder layer whose input channels are those of a structure, and add to the residual stream."""


class Importance(Protocol):
    """How much is lost without a part of a network."""

    STRUCTURES: ClassVar[tuple[Structure, ...]]
    """The structures that it has a meaning for."""

    def scores(self, network: PreTrainedModel, windows: Sequence[Sequence[int]], structure: Structure) -> list[Tensor]:
        """Scores on windows of calibration text, the least important lowest: one float64 tensor a layer.

        Its shape is (channels,), or () for whole layers. Scores of channels may be added up over a group of them.
        The network is left as it was.
        """
        ...


def output(layer: Any, structure: Structure) -> Any:
    """The linear module by which `structure` of a decoder layer adds to the residual stream."""
    return layer.get_submodule(OUTPUTS[structure])


def require_scores(importance: Importance, structure: Structure) -> None:
    """ConfigError where `importance` says nothing about `structure`."""
    if structure not in importance.STRUCTURES:
        raise ConfigError(
            f"{type(importance).__name__} scores {' and '.join(importance.STRUCTURES)}, and no {structure}",
            location="importance",
            hint="Choose block_influence or taylor" if structure == "layer" else "Choose activation, taylor or wanda",
        )
