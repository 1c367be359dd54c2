"""Fit scales and zero-points that are robust to outliers, without calibration text (HQQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compress.layerwise_forward import InputStatistic
from edgeopt.compress.preconditions import require_positive
from edgeopt.compress.quantization import rounding
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.model_spec import QuantizationScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq:
    """Half-quadratic quantization: minimize Σ |w - ŵ|^p with p < 1, which weights outliers less than squared error.

    After Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. Zero-points are
    integers here, because ONNX Runtime has no fast kernel for floating-point zero-points.

    Attributes:
        norm: p of the norm.
        iterations: number of alternations between the two sub-problems.
        beta, kappa: weight of the quadratic penalty, and the factor by which each iteration multiplies it.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "none"
    REMAINING_ERROR: ClassVar[float] = 1.0
    norm: float = 0.7
    iterations: int = 20
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        if not 0.0 < self.norm <= 1.0:
            raise ConfigError(
                f"`norm` must be greater than 0 and at most 1, got {self.norm}",
                location="norm",
                hint="Choose a value such as 0.7",
            )
        require_positive(self.iterations, "iterations")

    def round(self, weight: Tensor, scheme: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        """Quantize `weight`; see `edgeopt.compress.quantization.rounding.Rounding`."""
        import torch

        blocks = rounding.to_blocks(weight, scheme.block_size)
        scales, zero_points = next(rounding.candidate_scales(blocks, scheme))
        best = scales, zero_points
        lowest = self._loss(blocks, scales, zero_points, scheme.bits)
        beta = self.beta
        for _ in range(self.iterations):
            codes = rounding.quantize(blocks, scales, zero_points, scheme.bits)
            residual = blocks - rounding.dequantize(codes, scales, zero_points)
            target = blocks - shrink(residual, beta, self.norm)
            scales, zero_points = fit_scales_and_zero_points(target, codes, scales, zero_points, scheme)
            loss = self._loss(blocks, scales, zero_points, scheme.bits)
            improved = loss < lowest
            best = torch.where(improved, scales, best[0]), torch.where(improved, zero_points, best[1])
            lowest = torch.minimum(loss, lowest)
            beta *= self.kappa
        return rounding.to_quantized_matrix(rounding.quantize(blocks, *best, scheme.bits), *best)

    def _loss(self, blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
        """Return Σ |w - ŵ|^p of each block, shape (rows, blocks)."""
        codes = rounding.quantize(blocks, scales, zero_points, bits)
        return (blocks - rounding.dequantize(codes, scales, zero_points)).abs().pow(self.norm).sum(dim=-1)


def shrink(residual: Tensor, beta: float, norm: float) -> Tensor:
    """Return the generalized soft threshold sign(r) max(|r| - |r|^(p-1) / β, 0), element by element.

    It is the proximal step of the l_p norm (sub-problem 1 of HQQ).
    """
    magnitude = residual.abs()
    return residual.sign() * (magnitude - magnitude.clamp(min=1e-12).pow(norm - 1.0) / beta).clamp(min=0)


def fit_scales_and_zero_points(
    target: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return the scales and zero-points that bring the dequantized `codes` closest to `target` in least squares.

    A symmetric scheme keeps its zero-points. `target` and `codes` have shape (rows, blocks, block size), scales and
    zero-points (rows, blocks).
    """
    importance = rounding.channel_importance(None, target)
    scales = rounding.least_squares_scales(target, codes, scales, zero_points, importance)
    if scheme.symmetric:
        return scales, zero_points
    zero_points = (codes - target / scales[..., None]).mean(dim=-1).round().clamp(0, 2**scheme.bits - 1)
    return scales, zero_points
