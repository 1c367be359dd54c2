"""Compute the tables of rotary position embeddings (arXiv 2104.09864) when ONNX Runtime loads the graph.

The builder stores cos and sin for every position of the context instead. For a context of 8,192 tokens and a head size
of 64 these are 2 MB, as much as the layers of some small models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FUNCTIONS = {"cos_cache": "Cos", "sin_cache": "Sin"}
"""Operator that computes a table, by the prefix of the table's name."""
TOLERANCE = 1e-6


class RotaryNodes:
    """Replace each table that follows from the network's frequencies by nodes. Other tables are stored."""

    def __init__(self, model: Any, network: PreTrainedModel) -> None:
        self._model, self._store = model, model.make_initializer
        self._frequencies = list(rotary_frequencies(network))

    def install(self) -> None:
        """Replace the builder's method."""
        self._model.make_initializer = self.make_initializer

    def make_initializer(self, tensor: Any, name: str, *rest: Any, **options: Any) -> None:
        """Implement the builder's make_initializer."""
        function = next((f for prefix, f in FUNCTIONS.items() if name.startswith(prefix)), None)
        match = None if function is None else match_frequencies(tensor, function, self._frequencies)
        if function is None or match is None:
            self._store(tensor, name, *rest, **options)
        else:
            self._compute(name, function, len(tensor), *match)

    def _compute(self, name: str, function: str, length: int, frequency: Tensor, scale: float) -> None:
        import numpy as np
        import onnx_ir as ir

        model, prefix = self._model, f"/rotary/{name}"
        shape, table = [length, len(frequency)], ir.DataType.FLOAT
        bounds = [f"/model/constants/INT64/{number}" for number in (0, length, 1)]
        self._store(frequency.numpy()[None, :], f"{name}.frequency")
        self._store(np.array(scale, np.float32), f"{name}.scale")
        model.make_node("Range", inputs=bounds, outputs=[f"{prefix}/Range/output_0"], name=f"{prefix}/Range")
        model.make_value(f"{prefix}/Range/output_0", ir.DataType.INT64, shape=[length])
        model.make_cast(f"{prefix}/Cast", f"{prefix}/Range/output_0", table, shape=[length])
        model.make_unsqueeze(
            f"{prefix}/Unsqueeze", [f"{prefix}/Cast/output_0", "/model/constants/INT64/[1]"], table, shape=[length, 1]
        )
        model.make_mul(f"{prefix}/Mul", [f"{prefix}/Unsqueeze/output_0", f"{name}.frequency"], table, shape=shape)
        node = f"{prefix}/{function}"
        model.make_node(function, inputs=[f"{prefix}/Mul/output_0"], outputs=[f"{node}/output_0"], name=node)
        model.make_value(f"{node}/output_0", table, shape=shape)
        model.make_node("Mul", inputs=[f"{node}/output_0", f"{name}.scale"], outputs=[name], name=f"{prefix}/Scale")
        model.make_value(name, table, shape=shape)


def rotary_frequencies(network: PreTrainedModel) -> Iterator[tuple[Tensor, float]]:
    """Yield the angles per position, shape (rotary dimensions / 2,), with the scale of cos and sin.

    Some families have different ones for each layer type.
    """
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                yield buffer, float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))


def match_frequencies(
    table: Tensor, function: str, candidates: list[tuple[Tensor, float]]
) -> tuple[Tensor, float] | None:
    """Return the frequencies and scale from which `function` (Cos or Sin) computes `table`, or None.

    Args:
        table: shape (positions, rotary dimensions / 2).
    """
    import torch

    compute = {"Cos": torch.cos, "Sin": torch.sin}[function]
    for frequency, scale in candidates:
        if table.dtype == torch.float32 and table.shape[1:] == frequency.shape:
            angles = torch.outer(torch.arange(len(table)).float(), frequency)
            if float((compute(angles) * scale - table).abs().max()) <= TOLERANCE:
                return frequency, scale
    return None
