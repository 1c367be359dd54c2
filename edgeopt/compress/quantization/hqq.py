"""Half-quadratic quantization: robust scales and zero-points without calibration text."""

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
    """Minimize Σ |w - ŵ|^p with p < 1, which cares less for outliers than squared error does.

    After HQQ (Badri & Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models"), with
    whole zero-points, because float ones take a slow path in ONNX Runtime.

    Attributes:
        norm: p of the norm.
        iterations: alternations between the two sub-problems.
        beta, kappa: weight of the quadratic penalty and its growth an iteration.
    """

    INPUT_STATISTIC: ClassVar[InputStatistic] = "none"
    REMAINING_ERROR: ClassVar[float] = 1.0
    norm: float = 0.7
    iterations: int = 20
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        if not 0.0 < self.norm <= 1.0:
            raise ConfigError(f"{self.norm} is outside its range", location="norm", hint="Give more than 0, at most 1")
        require_positive(self.iterations, "iterations")

    def round(self, weight: Tensor, grid: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        import torch

        blocks = rounding.blocked(weight, grid.block_size)
        scales, zero_points = next(rounding.candidates(blocks, grid))
        best = scales, zero_points
        least = self._loss(blocks, scales, zero_points, grid.bits)
        beta = self.beta
        for _ in range(self.iterations):
            codes = rounding.encode(blocks, scales, zero_points, grid.bits)
            residual = blocks - rounding.decode(codes, scales, zero_points)
            target = blocks - shrink(residual, beta, self.norm)
            scales, zero_points = fit(target, codes, scales, zero_points, grid)
            lost = self._loss(blocks, scales, zero_points, grid.bits)
            better = lost < least
            best = torch.where(better, scales, best[0]), torch.where(better, zero_points, best[1])
            least = torch.minimum(lost, least)
            beta *= self.kappa
        return rounding.assembled(rounding.encode(blocks, *best, grid.bits), *best)

    def _loss(self, blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
        codes = rounding.encode(blocks, scales, zero_points, bits)
        return (blocks - rounding.decode(codes, scales, zero_points)).abs().pow(self.norm).sum(dim=-1)


def shrink(residual: Tensor, beta: float, norm: float) -> Tensor:
    """The generalized soft threshold: sign(r) max(|r| - |r|^(p-1) / β, 0), the proximal step of the l_p norm."""
    size = residual.abs()
    return residual.sign() * (size - size.clamp(min=1e-12).pow(norm - 1.0) / beta).clamp(min=0)


def fit(
    target: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, grid: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Scales, and zero-points where the grid has them, that bring `codes` nearest to `target` in least squares."""
    scales = rounding.fitted(target, codes, scales, zero_points, rounding.weights_of(None, target))
    if grid.symmetric:
        return scales, zero_points
    moved = (codes - target / scales[..., None]).mean(dim=-1).round().clamp(0, 2**grid.bits - 1)
    return scales, moved
