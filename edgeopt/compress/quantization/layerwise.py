"""Quantize a network layer by layer, each layer with the inputs that the quantized layers before it produce."""

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
    """Quantize every unit in `schemes` in place; the network then holds the dequantized weights.

    An embedding, and an lm_head tied to it, is quantized with KQuant for any `rounding`.

    Args:
        schemes: by unit name.
        windows: calibration text; only read if `rounding` needs an input statistic or a scheme has a bias.

    Returns:
        The quantized matrices by module name.
    """
    module_names = modeling.unit_modules(network)
    quantized: dict[str, QuantizedMatrix] = {}

    def apply(unit: str, method: Rounding, statistic: Tensor | None, mean: Tensor | None = None) -> None:
        quantized.update(quantize_unit(network, module_names[unit], schemes[unit], method, statistic, mean))

    needs_text = rounding.INPUT_STATISTIC != "none" or any(scheme.bias for scheme in schemes.values())
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    if EMBEDDING in schemes:
        method, statistic = KQuant(), None
        if tied and needs_text:
            statistic = lm_head_input_statistic(network, windows, method.INPUT_STATISTIC)
        apply(EMBEDDING, method, statistic)
        if tied:
            network.get_output_embeddings().weight = network.get_input_embeddings().weight
    forward = LayerwiseForward.start(network, windows) if needs_text else None

    def input_statistic(unit: str, layer: Any, layer_index: int, kind: InputStatistic) -> Tensor | None:
        if forward is None or kind == "none":
            return None
        return forward.input_statistic(layer, layer_index, network.get_submodule(module_names[unit][0]), kind)

    layers = modeling.layers(network)
    for index, layer in enumerate(layers):
        progress(f"quantizing layer {index + 1} of {len(layers)}")
        for name in UNITS:
            unit = f"layers.{index}.{name}"
            if unit in schemes:
                mean = input_statistic(unit, layer, index, "mean") if schemes[unit].bias else None
                apply(unit, rounding, input_statistic(unit, layer, index, rounding.INPUT_STATISTIC), mean)
        if forward is not None:
            forward.advance(layer, index)
    if LM_HEAD in schemes and not tied:
        kind = rounding.INPUT_STATISTIC
        apply(LM_HEAD, rounding, None if kind == "none" else lm_head_input_statistic(network, windows, kind))
    return quantized


def quantize_unit(
    network: PreTrainedModel,
    module_names: Sequence[str],
    scheme: QuantizationScheme,
    rounding: Rounding,
    statistic: Tensor | None,
    mean: Tensor | None = None,
) -> dict[str, QuantizedMatrix]:
    """Quantize the modules as one matrix and replace their weights with the dequantized ones.

    If `mean` is given, the bias corrects the mean change of the output, (W - Ŵ) E[x] (Nagel et al., arXiv 1906.04721).

    Args:
        module_names: modules with the same input; their rows are stacked.
        statistic: see `Rounding.round`.
        mean: E[x], float64 of shape (columns,).

    Returns:
        The quantized matrices by module name.
    """
    import torch
    from torch import nn

    modules = [network.get_submodule(name) for name in module_names]
    weights: list[Any] = [module.weight.detach() for module in modules]
    stacked = rounding.round(torch.cat(weights), scheme, statistic)
    matrices = stacked.split([len(weight) for weight in weights])
    for module, matrix in zip(modules, matrices, strict=True):
        if mean is not None:
            correction = ((module.weight.detach() - matrix.weight).double() @ mean).float()
            bias = correction if module.bias is None else module.bias + correction
            module.bias = nn.Parameter(bias, requires_grad=False)
        module.weight = nn.Parameter(matrix.weight, requires_grad=False)
    return dict(zip(module_names, matrices, strict=True))
