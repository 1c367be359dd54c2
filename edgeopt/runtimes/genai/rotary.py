"""Tables of rotary position embeddings (arXiv 2104.09864) as nodes that ONNX Runtime computes once, when it loads.

The builder stores cos and sin of every position up to the model's context: 2 MB for a context of 8,192 and heads of
64, as much as some small models' layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FUNCTIONS = {"cos_cache": "Cos", "sin_cache": "Sin"}
"""Beginnings of the tables' names, and what each holds."""
TOLERANCE = 1e-6


class RotaryNodes:
    """Writes nodes in place of each table that the network's frequencies explain; others are stored as they are."""

    def __init__(self, model: Any, network: PreTrainedModel) -> None:
        self._model, self._store = model, model.make_initializer
        self._frequencies = list(frequencies(network))

    def install(self) -> None:
        self._model.make_initializer = self.initializer

    def initializer(self, tensor: Any, name: str, *rest: Any, **options: Any) -> None:
        """As the builder's make_initializer."""
        function = next((f for beginning, f in FUNCTIONS.items() if name.startswith(beginning)), None)
        found = None if function is None else explained(tensor, function, self._frequencies)
        if function is None or found is None:
            self._store(tensor, name, *rest, **options)
        else:
            self._compute(name, function, len(tensor), *found)

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


def frequencies(network: PreTrainedModel) -> Iterator[tuple[Tensor, float]]:
    """Angles by which one position turns, shape (rotary dimensions / 2,), with the scale of cos and sin.

    Some families have one for each type of layer.
    """
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                yield buffer, float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))


def explained(table: Tensor, function: str, known: list[tuple[Tensor, float]]) -> tuple[Tensor, float] | None:
    """The frequencies and scale of which `table`, (positions, frequencies), is the cosine or sine; None of none."""
    import torch

    compute = {"Cos": torch.cos, "Sin": torch.sin}[function]
    for frequency, scale in known:
        if table.dtype == torch.float32 and table.shape[1:] == frequency.shape:
            angles = torch.outer(torch.arange(len(table)).float(), frequency)
            if float((compute(angles) * scale - table).abs().max()) <= TOLERANCE:
                return frequency, scale
    return None
