"""Move activation outliers into weights before both are quantized to 8 bits (SmoothQuant)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import LayerwiseForward
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.activation_ranges import affine_parameters
from edgeopt.compress.quantization.folding import average_query_groups, fold_scales
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import UNITS, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

ALPHAS = tuple(n / 20 for n in range(0, 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant:
    """SmoothQuant (arXiv 2211.10438, equation 4): scales s = max|x|^α / max|w|^(1-α) per input channel.

    The scales are folded into norms and preceding matrices, so this step does not change the network's output. A
    later `int8` step then loses less.

    Attributes:
        alpha: migration strength, from 0 to below 1. null: search it for each unit by the output error with 8-bit
            inputs and weights.
        tokens: number of calibration tokens in this search.
        windows, window_tokens: amount of calibration text.
    """

    alpha: float | None = None
    tokens: int = 512
    windows: int = 16
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("tokens", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        if self.alpha is not None and not 0.0 <= self.alpha < 1.0:
            raise ConfigError(
                f"`alpha` must be at least 0 and less than 1, got {self.alpha}",
                location="alpha",
                hint="Use 0.5, or null to search it for each unit",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` unchanged; raise ConfigError if its weights are already quantized."""
        require_float(spec, "smooth_quant")
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the smoothed checkpoint, and the α of every unit to artifacts/smooth_quant_alphas.json."""
        import torch

        network, spec = modeling.load(checkpoint), checkpoint.spec
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        forward, module_names = LayerwiseForward.start(network, windows), modeling.unit_modules(network)
        selected_alphas = {}
        for index, layer in enumerate(modeling.layers(network)):
            context.progress(f"smoothing layer {index + 1} of {len(spec.layers)}")
            for unit in UNITS:
                name = f"layers.{index}.{unit}"
                modules: list[Any] = [network.get_submodule(module) for module in module_names[name]]
                window_inputs: list[Tensor] = []
                forward.for_each_input(layer, index, modules[0], window_inputs.append)
                inputs = torch.cat([tensor.flatten(0, -2) for tensor in window_inputs])
                weight = torch.cat([module.weight.detach() for module in modules])
                max_input, max_weight = inputs.abs().amax(dim=0), weight.abs().amax(dim=0)
                if unit == "o":
                    max_input = average_query_groups(max_input, spec.layers[index])
                    max_weight = average_query_groups(max_weight, spec.layers[index])
                stride = max(1, len(inputs) // self.tokens)
                alphas = ALPHAS if self.alpha is None else (self.alpha,)
                alpha, scales = search_scales(weight, inputs[::stride], max_input, max_weight, alphas)
                fold_scales(layer, unit, modules, scales, spec.layers[index])
                selected_alphas[name] = alpha
            forward.advance(layer, index)
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        document = json.dumps(selected_alphas, indent=1) + "\n"
        (directory / "artifacts" / "smooth_quant_alphas.json").write_text(document)
        return spec


def search_scales(
    weight: Tensor, inputs: Tensor, max_input: Tensor, max_weight: Tensor, alphas: tuple[float, ...]
) -> tuple[float, Tensor]:
    """Return the α with the lowest squared output error after 8-bit quantization, and its scales.

    Args:
        weight: float32, shape (rows, columns).
        inputs: float32, shape (tokens, columns).
        max_input, max_weight: largest magnitude of each channel's inputs and weights, shape (columns,).
        alphas: values of α to try.

    Returns:
        α, and scales of shape (columns,), relative to their mean.
    """
    import torch

    expected = inputs @ weight.T
    best_alpha, best_scales, lowest = 0.0, torch.ones_like(max_input), float("inf")
    for alpha in alphas:
        scales = max_input.clamp(min=1e-5).pow(alpha) / max_weight.clamp(min=1e-5).pow(1 - alpha)
        scales = (scales / scales.mean()).clamp(min=1e-4)
        output = _quantized_inputs(inputs / scales) @ _quantized_weight(weight * scales).T
        error = float((output - expected).square().sum())
        if error < lowest:
            best_alpha, best_scales, lowest = alpha, scales, error
    return best_alpha, best_scales


def _quantized_inputs(inputs: Tensor) -> Tensor:
    """Quantize inputs to 8 bits with one range for all tokens and channels, and dequantize them."""
    scale, zero_point = affine_parameters(float(inputs.min()), float(inputs.max()), symmetric=False)
    return ((inputs / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale


def _quantized_weight(weight: Tensor) -> Tensor:
    """Quantize a weight to 8 bits per output channel, and dequantize it."""
    scheme = QuantizationScheme(bits=8, block_size=weight.shape[1], symmetric=True)
    return Rtn(clip=False).round(weight, scheme, None).weight
