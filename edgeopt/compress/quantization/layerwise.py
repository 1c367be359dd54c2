"""Rounding a network one layer after another, each on the inputs that the rounded layers before it produce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.layerwise_forward import InputStatistic, LayerwiseForward, lm_head_input_statistic
from edgeopt.compress.quantization.k_quant import KQuant
from edgeopt.compress.quantization.rounding import Rounding
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, QuantizationScheme

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.protocols import Progress


def quantize_network(
    network: PreTrainedModel,
    schemes: Mapping[str, QuantizationScheme],
    rounding: Rounding,
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> dict[str, QuantizedMatrix]:
    """Round every unit in `grids`; the network then holds the rounded weights.

    Returns the rounded matrices by the names of their modules. `windows` of calibration text are read only
    where `rounding` wants to know its inputs, or a grid has a bias.
    """
    modules = modeling.units(network)
    found: dict[str, QuantizedMatrix] = {}

    def apply(unit: str, how: Rounding, statistic: Tensor | None, mean: Tensor | None = None) -> None:
        found.update(quantize_unit(network, modules[unit], schemes[unit], how, statistic, mean))

    reads_text = rounding.INPUT_STATISTIC != "none" or any(grid.bias for grid in schemes.values())
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    if EMBEDDING in schemes:
        table = KQuant()
        apply(
            EMBEDDING,
            table,
            lm_head_input_statistic(network, windows, table.INPUT_STATISTIC) if tied and reads_text else None,
        )
        if tied:
            network.get_output_embeddings().weight = network.get_input_embeddings().weight
    stream = LayerwiseForward.start(network, windows) if reads_text else None

    def seen(name: str, layer: Any, number: int, kind: InputStatistic) -> Tensor | None:
        if stream is None or kind == "none":
            return None
        return stream.input_statistic(layer, number, network.get_submodule(modules[name][0]), kind)

    layers = modeling.layers(network)
    for number, layer in enumerate(layers):
        progress(f"rounding layer {number + 1} of {len(layers)}")
        for unit in UNITS:
            name = f"layers.{number}.{unit}"
            if name in schemes:
                mean = seen(name, layer, number, "mean") if schemes[name].bias else None
                apply(name, rounding, seen(name, layer, number, rounding.INPUT_STATISTIC), mean)
        if stream is not None:
            stream.advance(layer, number)
    if LM_HEAD in schemes and not tied:
        known = rounding.INPUT_STATISTIC != "none"
        apply(LM_HEAD, rounding, lm_head_input_statistic(network, windows, rounding.INPUT_STATISTIC) if known else None)
    return found


def quantize_unit(
    network: PreTrainedModel,
    names: Sequence[str],
    grid: QuantizationScheme,
    how: Rounding,
    statistic: Tensor | None,
    mean: Tensor | None = None,
) -> dict[str, QuantizedMatrix]:
    """Round the modules `names` as one matrix and put the rounded weights in their place.

    Where the `mean` of their input is given, biases are corrected by what rounding changes in the mean of the output,
    (W - Ŵ) E[x] (Nagel et al., arXiv 1906.04721).
    """
    import torch
    from torch import nn

    modules = [network.get_submodule(name) for name in names]
    weights: list[Any] = [module.weight.detach() for module in modules]
    parts = how.round(torch.cat(weights), grid, statistic).split([len(weight) for weight in weights])
    for module, part in zip(modules, parts, strict=True):
        if mean is not None:
            lost = ((module.weight.detach() - part.weight).double() @ mean).float()
            module.bias = nn.Parameter(lost if module.bias is None else module.bias + lost, requires_grad=False)
        module.weight = nn.Parameter(part.weight, requires_grad=False)
    return dict(zip(names, parts, strict=True))
