"""SmoothQuant: outliers of activations are moved into weights, where rounding them costs less."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import LayerwiseForward
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.activation_ranges import affine
from edgeopt.compress.quantization.folding import fold, shared
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
    """Balance the ranges of inputs and weights by channel (arXiv 2211.10438): s = max|x|^α / max|w|^(1-α).

    The network computes as before; a later `int8` step loses less.

    Attributes:
        alpha: how much of the difficulty moves into the weights; left open, it is searched for each unit by the
            output error of 8-bit inputs and weights.
        tokens: how many calibration tokens that search looks at.
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
                f"{self.alpha} is outside its range", location="alpha", hint="Give 0 up to below 1, or null"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "smooth_quant")
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        network, spec = modeling.load(checkpoint), checkpoint.spec
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        stream, modules = LayerwiseForward.start(network, windows), modeling.units(network)
        chosen = {}
        for number, layer in enumerate(modeling.layers(network)):
            context.progress(f"smoothing layer {number + 1} of {len(spec.layers)}")
            for unit in UNITS:
                parts: list[Any] = [network.get_submodule(name) for name in modules[f"layers.{number}.{unit}"]]
                seen: list[Tensor] = []
                stream.for_each_input(layer, number, parts[0], seen.append)
                inputs = torch.cat([s.flatten(0, -2) for s in seen])
                weight = torch.cat([part.weight.detach() for part in parts])
                size, reach = inputs.abs().amax(dim=0), weight.abs().amax(dim=0)
                if unit == "o":
                    size, reach = (shared(values, spec.layers[number]) for values in (size, reach))
                stride = max(1, len(inputs) // self.tokens)
                alphas = ALPHAS if self.alpha is None else (self.alpha,)
                alpha, scales = search(weight, inputs[::stride], size, reach, alphas)
                fold(layer, unit, parts, scales, spec.layers[number])
                chosen[f"layers.{number}.{unit}"] = alpha
            stream.advance(layer, number)
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "smooth_quant_alphas.json").write_text(json.dumps(chosen, indent=1) + "\n")
        return spec


def search(
    weight: Tensor, inputs: Tensor, size: Tensor, reach: Tensor, alphas: tuple[float, ...]
) -> tuple[float, Tensor]:
    """The alpha whose scales change the product of rounded inputs and weights least, and these scales, (columns,).

    Args:
        weight, inputs: float32, (rows, columns) and (tokens, columns).
        size, reach: largest magnitudes of each channel's inputs and weights.
    """
    import torch

    expected = inputs @ weight.T
    best, chosen, least = 0.0, torch.ones_like(size), float("inf")
    for alpha in alphas:
        scales = size.clamp(min=1e-5).pow(alpha) / reach.clamp(min=1e-5).pow(1 - alpha)
        scales = (scales / scales.mean()).clamp(min=1e-4)
        lost = float((_rounded(inputs / scales) @ _on_channels(weight * scales).T - expected).square().sum())
        if lost < least:
            best, chosen, least = alpha, scales, lost
    return best, chosen


def _rounded(inputs: Tensor) -> Tensor:
    """Inputs on 256 levels between their extremes."""
    scale, zero = affine(float(inputs.min()), float(inputs.max()), symmetric=False)
    return ((inputs / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def _on_channels(weight: Tensor) -> Tensor:
    return (
        Rtn(clip=False)
        .round(weight, QuantizationScheme(bits=8, block_size=weight.shape[1], symmetric=True), None)
        .weight
    )
