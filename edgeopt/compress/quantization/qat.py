"""Fine-tune the codes and scales of a quantized model with quantization-aware training (QAT)."""

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
from edgeopt.compress.quantization.rounding import round_to_fp16
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

MAX_INITIAL_OFFSET, DISPLACED_OFFSET = 0.49, 0.25
"""A trainable code starts at the value of its weight before quantization, in units of the scale.

GPTQ assigns some weights a code that is not the nearest. Training must not undo this choice at its first step, so such
a code starts DISPLACED_OFFSET from its assigned integer, towards the weight before quantization."""
SCALE_STEP = 0.05
"""Relative change of a scale for a unit change of its parameter; a unit change of a code's parameter is one code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qat(DistillationTraining):
    """Fine-tune a quantized model in its own quantization schemes towards the uncompressed model's predictions.

    The forward pass uses the dequantized weights that the engine will hold. Gradients pass through the rounding
    unchanged (straight-through estimator, arXiv 1308.3432) to the codes and the scales (LSQ, arXiv 1902.08153).
    lm_head, embedding, norms and zero-points are not trained.

    Attributes:
        learning_rate: peak learning rate, in codes per step.
    """

    learning_rate: float = 0.01

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` unchanged; raise ConfigError if its layers are not quantized or cannot be trained."""
        require_no_kv_cache(spec, "qat")
        require_no_adapters(spec, "qat")
        require_dense(spec, "qat", hint="Remove one of the two steps")
        if not any(name not in (LM_HEAD, EMBEDDING) for name in spec.schemes):
            raise ConfigError(
                "qat trains quantized weights, but no layer is quantized",
                location="order",
                hint="Put a quantize step before qat",
            )
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the trained checkpoint, and the losses to artifacts/qat_loss.json."""
        import torch

        torch.manual_seed(self.seed)
        spec = self.plan(checkpoint.spec)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        loss = self.loss(context.original, windows, context)
        network = modeling.load(checkpoint)
        quantized = quantized_matrix.quantized_matrices(safetensors_io.read_folder(checkpoint.directory))
        trained = parametrize(network, modeling.load(context.float_checkpoint), quantized, spec)
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
        quantized |= {name: weight.to_matrix() for name, weight in trained.items()}
        unparametrized = modeling.load(checkpoint)
        modeling.save(unparametrized, directory, checkpoint, spec, quantized)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "qat_loss.json").write_text(json.dumps(losses) + "\n")
        return spec


def parametrize(
    network: PreTrainedModel,
    float_network: PreTrainedModel,
    quantized: Mapping[str, QuantizedMatrix],
    spec: ModelSpec,
) -> dict[str, Any]:
    """Replace the layers' quantized weights by parametrizations with trainable codes and scales.

    Args:
        float_network: the network before quantization; its weights give the initial values of the codes.
        quantized: quantized matrices by module name.

    Returns:
        The parametrizations by module name.
    """
    from torch.nn.utils.parametrize import register_parametrization

    module_names = modeling.unit_modules(network)
    parametrizations = {}
    for unit, scheme in spec.schemes.items():
        for name in module_names[unit] if unit not in (LM_HEAD, EMBEDDING) else ():
            float_weight: Any = float_network.get_submodule(name).weight
            parametrizations[name] = _trainable_weight(quantized[name], scheme.bits, float_weight.detach())
            register_parametrization(network.get_submodule(name), "weight", parametrizations[name])
    return parametrizations


def _trainable_weight(matrix: QuantizedMatrix, bits: int, float_weight: Tensor) -> Any:
    """Return a parametrization that computes a weight from trainable codes and scales.

    `float_weight` is the matrix before quantization, shape (rows, columns). Codes are relative to the zero-point and
    have the shape (rows, blocks, block size), scales (rows, blocks).
    """
    import torch
    from torch import nn

    class TrainableWeight(nn.Module):
        """weight = round(codes) · fp16(scales); gradients pass through both roundings unchanged."""

        initial_scales: Tensor
        min_code: Tensor
        max_code: Tensor

        def __init__(self) -> None:
            super().__init__()
            zero_points = matrix.zero_points.float()[..., None]
            self.register_buffer("initial_scales", matrix.scales.clone())
            self.register_buffer("min_code", -zero_points)
            self.register_buffer("max_code", 2**bits - 1 - zero_points)
            codes = matrix.codes.float().reshape(*matrix.scales.shape, -1) + self.min_code
            offset = float_weight.reshape(codes.shape) / self.initial_scales[..., None] - codes
            nearest = offset.abs() < MAX_INITIAL_OFFSET
            self.codes = nn.Parameter(codes + torch.where(nearest, offset, offset.sign() * DISPLACED_OFFSET))
            self.scale_change = nn.Parameter(torch.zeros_like(matrix.scales))

        def forward(self, _: Tensor) -> Tensor:
            rounded_codes, rounded_scales = self.round()
            clamped = torch.minimum(torch.maximum(self.codes, self.min_code), self.max_code)
            codes = clamped + (rounded_codes - clamped).detach()
            scales = self.initial_scales * (1 + SCALE_STEP * self.scale_change)
            return (codes * (scales + (rounded_scales - scales).detach())[..., None]).flatten(1)

        def round(self) -> tuple[Tensor, Tensor]:
            """Return the codes, relative to the zero-point, and the scales that the engine will hold."""
            with torch.no_grad():
                codes = torch.minimum(torch.maximum(self.codes.round(), self.min_code), self.max_code)
                return codes, round_to_fp16(self.initial_scales * (1 + SCALE_STEP * self.scale_change))

        def to_matrix(self) -> QuantizedMatrix:
            """Return the quantized matrix that a checkpoint stores."""
            codes, scales = self.round()
            return QuantizedMatrix(
                codes=(codes - self.min_code).flatten(1).to(torch.uint8),
                scales=scales,
                zero_points=matrix.zero_points,
            )

    return TrainableWeight()
