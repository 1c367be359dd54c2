"""AWQ: input channels that carry much are scaled up before rounding, so that they lose less."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import LayerwiseForward
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.folding import fold, shared
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import UNITS, ModelSpec, QuantizationScheme

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Activation-aware scaling (AWQ, arXiv 2306.00978), folded into norms and preceding matrices.

    The network computes as before; what is gained appears when a later step rounds it. Each unit's scales are
    its inputs' root mean square to a power that is searched for the least output error after rounding.

    Attributes:
        bits, block_size, symmetric: the grid that the weights will be rounded onto.
        powers: how many powers from 0 to 1 are tried.
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
        require_float(spec, "awq")
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        network, spec = modeling.load(checkpoint), checkpoint.spec
        grid = QuantizationScheme(bits=self.bits, block_size=self.block_size, symmetric=self.symmetric)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        stream, modules = LayerwiseForward.start(network, windows), modeling.units(network)
        report = {}
        for number, layer in enumerate(modeling.layers(network)):
            context.progress(f"scaling layer {number + 1} of {len(spec.layers)}")
            for unit in UNITS:
                parts: list[Any] = [network.get_submodule(name) for name in modules[f"layers.{number}.{unit}"]]
                if spec.matrices[f"layers.{number}.{unit}"][1] % self.block_size:
                    continue
                hessian = stream.input_statistic(layer, number, parts[0], "hessian").float()
                size = hessian.diagonal().sqrt()
                if unit == "o":
                    size = shared(size, spec.layers[number])
                weight = torch.cat([part.weight.detach() for part in parts])
                power, scales = search(weight, hessian, size, grid, self.powers)
                fold(layer, unit, parts, scales, spec.layers[number])
                report[f"layers.{number}.{unit}"] = power
            stream.advance(layer, number)
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "awq_powers.json").write_text(json.dumps(report, indent=1) + "\n")
        return spec


def search(
    weight: Tensor, hessian: Tensor, size: Tensor, grid: QuantizationScheme, powers: int
) -> tuple[float, Tensor]:
    """The power of `size`, (columns,), that as scales loses least of the output, and these scales.

    The output error of a change D is tr(D H Dᵀ), with H the mean of x xᵀ.
    """
    import torch

    best, chosen, least = 0.0, torch.ones_like(size), float("inf")
    for step in range(powers):
        power = step / powers
        scales = size.clamp(min=1e-4 * float(size.mean())).pow(power)
        scales = scales / (scales.max() * scales.min()).sqrt()
        change = Rtn(clip=False).round(weight * scales, grid, None).weight / scales - weight
        lost = float(((change @ hessian) * change).sum())
        if lost < least:
            best, chosen, least = power, scales, lost
    return best, chosen
