"""Scale up salient input channels before quantization (AWQ)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import LayerwiseForward
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.folding import average_query_groups, fold_scales
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import UNITS, ModelSpec, QuantizationScheme

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Activation-aware weight quantization (AWQ, arXiv 2306.00978): per-channel scales for a later quantize step.

    The scales are folded into norms and preceding matrices, so this step does not change the network's output.
    The scales of a unit are s = RMS(x)^α per input channel. A grid search over α minimizes the output error after
    quantization (AWQ, equations 4 and 5). `block_size` must divide the unit's input side; other units stay unscaled.

    Attributes:
        bits, block_size, symmetric: quantization scheme of the later quantize step.
        powers: number of values of α, evenly spaced from 0 to below 1.
        windows, window_tokens: amount of calibration text.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    powers: int = 20
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("bits", "block_size", "powers", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` unchanged; raise ConfigError if its weights are already quantized."""
        require_float(spec, "awq")
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the scaled checkpoint, and the selected α of every unit to artifacts/awq_powers.json."""
        import torch

        network, spec = modeling.load(checkpoint), checkpoint.spec
        scheme = QuantizationScheme(bits=self.bits, block_size=self.block_size, symmetric=self.symmetric)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        forward, module_names = LayerwiseForward.start(network, windows), modeling.unit_modules(network)
        selected_powers = {}
        for index, layer in enumerate(modeling.layers(network)):
            context.progress(f"scaling layer {index + 1} of {len(spec.layers)}")
            for unit in UNITS:
                name = f"layers.{index}.{unit}"
                if spec.matrices[name][1] % self.block_size:
                    continue
                modules: list[Any] = [network.get_submodule(module) for module in module_names[name]]
                hessian = forward.input_statistic(layer, index, modules[0], "hessian").float()
                input_rms = hessian.diagonal().sqrt()
                if unit == "o":
                    input_rms = average_query_groups(input_rms, spec.layers[index])
                weight = torch.cat([module.weight.detach() for module in modules])
                power, scales = search_scales(weight, hessian, input_rms, scheme, self.powers)
                fold_scales(layer, unit, modules, scales, spec.layers[index])
                selected_powers[name] = power
            forward.advance(layer, index)
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "awq_powers.json").write_text(json.dumps(selected_powers, indent=1) + "\n")
        return spec


def search_scales(
    weight: Tensor, hessian: Tensor, input_rms: Tensor, scheme: QuantizationScheme, powers: int
) -> tuple[float, Tensor]:
    """Return the power α and the scales input_rms^α with the lowest output error after rounding to nearest.

    The output error of a weight change D is tr(D H Dᵀ). Scales are normalized by sqrt(max · min).

    Args:
        weight: float32, shape (rows, columns).
        hessian: H = E[x xᵀ], shape (columns, columns).
        input_rms: sqrt(E[x²]) per input channel, shape (columns,).
        powers: number of values of α to try.

    Returns:
        α, and scales of shape (columns,).
    """
    import torch

    best_power, best_scales, lowest = 0.0, torch.ones_like(input_rms), float("inf")
    for step in range(powers):
        power = step / powers
        scales = input_rms.clamp(min=1e-4 * float(input_rms.mean())).pow(power)
        scales = scales / (scales.max() * scales.min()).sqrt()
        change = Rtn(clip=False).round(weight * scales, scheme, None).weight / scales - weight
        error = float(((change @ hessian) * change).sum())
        if error < lowest:
            best_power, best_scales, lowest = power, scales, error
    return best_power, best_scales
