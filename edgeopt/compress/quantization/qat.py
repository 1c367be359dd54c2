"""Quantization-aware training: codes and scales of a rounded model are moved so that it predicts better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_no_adapters, require_no_kv_cache
from edgeopt.compress.quantization.rounding import stored
from edgeopt.compress.recovery.teacher_logits import DistillationTraining
from edgeopt.compress.recovery.training import training_device
from edgeopt.core.config_objects import to_config
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

EDGE, DISPLACED = 0.49, 0.25
"""Weights begin where they were before rounding. Those that were rounded to another than their nearest code, as GPTQ
does on purpose, begin this far from it on the side that they came from: at the edge all would go back at once."""
SCALE_SHARE = 0.05
"""How far a scale moves, as a share of itself, while a code moves by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qat(DistillationTraining):
    """Fine-tune a quantized model on its own grid, towards the uncompressed model's predictions.

    The forward pass computes with the rounded weights that the engine will hold; gradients pass the rounding
    unchanged (straight-through estimator, arXiv 1308.3432), to the codes and to the scales (LSQ, arXiv
    1902.08153). Tables, norms and zero-points stay as they are.

    Attributes:
        learning_rate: in steps of the grid.
    """

    learning_rate: float = 0.01

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_no_kv_cache(spec, "qat")
        require_no_adapters(spec, "qat")
        require_dense(spec, "qat", hint="Leave one of the two out")
        if not any(name not in (LM_HEAD, EMBEDDING) for name in spec.schemes):
            raise ConfigError(
                "qat trains weights that are rounded already, and none are",
                location="order",
                hint="Put a quantize step before qat",
            )
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        torch.manual_seed(self.seed)
        spec = self.plan(checkpoint.spec)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        loss = self.loss(context.original, windows, context)
        network = modeling.load(checkpoint)
        rounded = quantized_matrix.rounded(safetensors_io.read_folder(checkpoint.directory))
        trained = parametrize(network, modeling.load(context.float_checkpoint), rounded, spec)
        network.to(training_device())
        inputs = [
            "qat",
            checkpoint.digest,
            context.original.digest,
            context.float_checkpoint.digest,
            context.calibration.digest,
            to_config(self),
        ]
        with context.cache.resumable_folder(inputs) as draft:
            losses = self.fit(network, loss, len(windows), context.progress, draft)
        network.cpu()
        after = rounded | {name: matrix.rounded() for name, matrix in trained.items()}
        plain = modeling.load(checkpoint)
        modeling.save(plain, directory, checkpoint, spec, after)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "qat_loss.json").write_text(json.dumps(losses) + "\n")
        return spec


def parametrize(
    network: PreTrainedModel, floating: PreTrainedModel, rounded: Mapping[str, QuantizedMatrix], spec: ModelSpec
) -> dict[str, Any]:
    """Let the layers' modules in `rounded` compute their weight from trainable codes and scales; by module name.

    `floating` has the weights before they were rounded: they say how near each is to its next code.
    """
    from torch.nn.utils.parametrize import register_parametrization

    modules = modeling.units(network)
    made = {}
    for unit in spec.schemes:
        for name in modules[unit] if unit not in (LM_HEAD, EMBEDDING) else ():
            before: Any = floating.get_submodule(name).weight
            made[name] = _on_grid(rounded[name], spec.schemes[unit].bits, before.detach())
            register_parametrization(network.get_submodule(name), "weight", made[name])
    return made


def _on_grid(matrix: QuantizedMatrix, bits: int, before: Tensor) -> Any:
    """A parametrization that puts codes, which are learnt about the zero-point, in the place of a weight."""
    import torch
    from torch import nn

    class OnGrid(nn.Module):
        """weight = round(codes) * scale, whose gradient passes the rounding as it is."""

        start: Tensor
        low: Tensor
        high: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("start", matrix.scales.clone())
            self.register_buffer("low", -matrix.zero_points.float()[..., None])
            self.register_buffer("high", 2**bits - 1 - matrix.zero_points.float()[..., None])
            codes = matrix.codes.float().reshape(*matrix.scales.shape, -1) + self.low
            exact = before.reshape(codes.shape) / self.start[..., None]
            offset = exact - codes
            self.codes = nn.Parameter(codes + torch.where(offset.abs() < EDGE, offset, offset.sign() * DISPLACED))
            self.change = nn.Parameter(torch.zeros_like(matrix.scales))

        def forward(self, _: Tensor) -> Tensor:
            codes, scales = self.exact()
            inside = torch.minimum(torch.maximum(self.codes, self.low), self.high)
            passing = inside + (codes - inside).detach()
            moved = self.start * (1 + SCALE_SHARE * self.change)
            return (passing * (moved + (scales - moved).detach())[..., None]).flatten(1)

        def exact(self) -> tuple[Tensor, Tensor]:
            """Codes about the zero-point and scales as the engine holds them."""
            with torch.no_grad():
                codes = torch.minimum(torch.maximum(self.codes.round(), self.low), self.high)
                return codes, stored(self.start * (1 + SCALE_SHARE * self.change))

        def rounded(self) -> QuantizedMatrix:
            codes, scales = self.exact()
            return QuantizedMatrix(
                codes=(codes - self.low).flatten(1).to(torch.uint8), scales=scales, zero_points=matrix.zero_points
            )

    return OnGrid()
