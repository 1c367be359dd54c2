"""Fold per-channel scales into weights without changing the network's output.

The input x of a unit is divided by s and its weight W is multiplied by s: (W s)(x / s) = W x. The division is folded
into the module that produces x: the norm for qkv and gate_up, the rows of up for down, and the rows of v for o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.model_spec import LayerSpec

PRECEDING_NORMS = {"qkv": ("input_layernorm",), "gate_up": ("pre_feedforward_layernorm", "post_attention_layernorm")}
"""Possible names of the norm before a unit; the first one that a layer has is the one before the unit."""


def fold_scales(layer: Any, unit: str, modules: Sequence[Any], scales: Tensor, sizes: LayerSpec) -> None:
    """Divide the inputs of a layer's unit by `scales` and multiply the weights of `modules` by them.

    Args:
        modules: the linear modules of the unit.
        scales: shape (columns,). For `o`, query heads that share a key-value head must have equal scales
            (see `average_query_groups`).
    """
    if unit in PRECEDING_NORMS:
        _divide_norm(next(getattr(layer, name) for name in PRECEDING_NORMS[unit] if hasattr(layer, name)), scales)
    elif unit == "down":
        fused = getattr(layer.mlp, "gate_up_proj", None)
        _divide_last_rows(fused or layer.mlp.up_proj, scales, count=sizes.intermediate_size)
    else:
        attention = layer.self_attn
        head_size = len(scales) // sizes.heads
        value_scales = scales.reshape(sizes.kv_heads, -1, head_size)[:, 0].flatten()
        value = getattr(attention, "qkv_proj", None) or attention.v_proj
        _divide_last_rows(value, value_scales, count=len(value_scales))
    for module in modules:
        module.weight.data = module.weight * scales


def average_query_groups(values: Tensor, sizes: LayerSpec) -> Tensor:
    """Average `values` of the input channels of `o` over the query heads that share a key-value head.

    Input and result have shape (heads · head_size,).
    """
    groups = values.reshape(sizes.kv_heads, sizes.heads // sizes.kv_heads, -1)
    return groups.mean(dim=1, keepdim=True).expand_as(groups).flatten()


def _divide_norm(norm: nn.Module, scales: Tensor) -> None:
    """Divide the outputs of a norm by `scales`."""
    weight: Any = norm.weight
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0  # Gemma's norms multiply by 1 + weight
    weight.data = (weight + offset) / scales - offset
    if getattr(norm, "bias", None) is not None:
        bias: Any = norm.bias
        bias.data = bias / scales


def _divide_last_rows(linear: Any, scales: Tensor, *, count: int) -> None:
    """Divide the last `count` rows of a linear module by `scales`; in a fused matrix they are the rows of up or v."""
    linear.weight.data[-count:] /= scales[:, None]
    if linear.bias is not None:
        linear.bias.data[-count:] /= scales
