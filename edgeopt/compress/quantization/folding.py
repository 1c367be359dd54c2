"""Moving scale from a unit's input channels into its weights, without changing what the network computes.

x is divided by s and W multiplied by it, (W s)(x / s) = W x; the division is folded into what produces x: the
norm before qkv and gate_up, the rows of up before down, the rows of v before o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.model_spec import LayerSpec

NORMS = {"qkv": ("input_layernorm",), "gate_up": ("pre_feedforward_layernorm", "post_attention_layernorm")}
"""Names of the norm before a unit; the first that a layer has."""


def fold(layer: Any, unit: str, modules: Sequence[Any], scales: Tensor, sizes: LayerSpec) -> None:
    """Divide the inputs of a layer's unit by `scales`, shape (columns,), and multiply the weights of `modules` by them.

    For `o` the scales of query heads that share a key-value head must be alike (see `shared`).
    """
    if unit in NORMS:
        _divide_norm(next(getattr(layer, name) for name in NORMS[unit] if hasattr(layer, name)), scales)
    elif unit == "down":
        fused = getattr(layer.mlp, "gate_up_proj", None)
        _divide_rows(fused or layer.mlp.up_proj, scales, last=sizes.intermediate_size)
    else:
        attention = layer.self_attn
        head_size = len(scales) // sizes.heads
        own = scales.reshape(sizes.kv_heads, -1, head_size)[:, 0].flatten()
        _divide_rows(getattr(attention, "qkv_proj", None) or attention.v_proj, own, last=len(own))
    for module in modules:
        module.weight.data = module.weight * scales


def shared(values: Tensor, sizes: LayerSpec) -> Tensor:
    """Values of the input channels of `o`, averaged over the query heads that share a key-value head."""
    grouped = values.reshape(sizes.kv_heads, sizes.heads // sizes.kv_heads, -1)
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).flatten()


def _divide_norm(norm: nn.Module, scales: Tensor) -> None:
    weight: Any = norm.weight
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0  # Gemma's norms multiply by 1 + weight
    weight.data = (weight + offset) / scales - offset
    if getattr(norm, "bias", None) is not None:
        bias: Any = norm.bias
        bias.data = bias / scales


def _divide_rows(linear: Any, scales: Tensor, *, last: int) -> None:
    """Divide the last rows of a matrix, which in a fused one are those wanted."""
    linear.weight.data[-last:] /= scales[:, None]
    if linear.bias is not None:
        linear.bias.data[-last:] /= scales
