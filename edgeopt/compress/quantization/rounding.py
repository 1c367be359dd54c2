"""Define the protocol of rounding methods and the block-wise arithmetic that they share.

Blocks have the shape (rows, blocks, block size), scales and zero-points (rows, blocks). Importance weights the squared
error of each input channel and has the shape (blocks, block size); it derives from E[x²], the diagonal of E[x xᵀ].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
from edgeopt.compress.layerwise_forward import InputStatistic
from edgeopt.compress.preconditions import require_dense

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme

CLIPPING_RATIOS = tuple(1.0 - 0.04 * n for n in range(14))
"""Clipping bounds to try, as shares of a block's range."""
CHUNK_WEIGHTS = 2**16
"""Number of weights in one pass over the candidates; so many fit into the cache of a core."""


class Rounding(Protocol):
    """A method that selects the codes, scales and zero-points of a matrix."""

    INPUT_STATISTIC: ClassVar[InputStatistic]
    """Statistic of the matrix's input that `round` needs: `none`, `second_moment` or `hessian`."""

    REMAINING_ERROR: ClassVar[float]
    """Typical increase of perplexity, as a share of the increase by rounding to nearest."""

    def round(self, weight: Tensor, scheme: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        """Quantize `weight`, float32 of shape (rows, columns).

        Args:
            statistic: INPUT_STATISTIC in float64, shape (columns,) for `second_moment` or (columns, columns) for
                `hessian`. None for `none`, and where no calibration text is read.
        """
        ...


def require_sparsity_preserved(spec: ModelSpec, rounding: Rounding) -> None:
    """Raise ConfigError if the model is sparse and `rounding` would change its zeros by error compensation."""
    if rounding.INPUT_STATISTIC == "hessian":
        name = type(rounding).__name__.lower()
        require_dense(spec, f"rounding by {name}", hint="Use rounding=k_quant, rtn or hqq")


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """Reshape (rows, columns) to (rows, blocks, block size)."""
    return weight.reshape(len(weight), -1, block_size)


def quantize(blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Return the nearest codes clamp(round(w / s) + z, 0, 2^bits - 1) as float, in the shape of `blocks`."""
    return ((blocks / scales[..., None]).round() + zero_points[..., None]).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    """Return the weights (code - z) s in the shape of `codes`, (rows, blocks, block size)."""
    return (codes - zero_points[..., None]) * scales[..., None]


def round_to_fp16(scales: Tensor) -> Tensor:
    """Round scales to fp16, as engines store them, and clamp their magnitude to its normal range; returns float32."""
    import torch

    tiny, huge = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
    clamped = torch.where(scales < 0, -1.0, 1.0) * scales.abs().clamp(tiny, huge)
    return clamped.to(torch.float16).float()


def candidate_scales(blocks: Tensor, scheme: QuantizationScheme) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales and zero-points for decreasing clipping ratios; the first pair covers the full range."""
    import torch

    max_code = 2**scheme.bits - 1
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        extreme_index = blocks.abs().argmax(dim=-1, keepdim=True)
        extreme = blocks.gather(-1, extreme_index).squeeze(-1)
        zero_points = torch.full_like(extreme, middle)
        for ratio in CLIPPING_RATIOS:
            yield round_to_fp16(-extreme * ratio / middle), zero_points  # code 0 represents the extreme value
            yield round_to_fp16(extreme.abs() * ratio / (middle - 0.5)), zero_points
        return
    low, high = blocks.amin(dim=-1).clamp(max=0), blocks.amax(dim=-1).clamp(min=0)
    for ratio in CLIPPING_RATIOS:
        scales = round_to_fp16((high - low) * ratio / max_code)
        yield scales, (-low * ratio / scales).round().clamp(0, max_code)


def squared_error(blocks: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, importance: Tensor) -> Tensor:
    """Return Σ importance (w - ŵ)² of each block, shape (rows, blocks)."""
    return ((blocks - dequantize(codes, scales, zero_points)).square() * importance).sum(dim=-1)


def least_squares_scales(
    target: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, importance: Tensor
) -> Tensor:
    """Return the scales that bring the dequantized `codes` closest to `target` in weighted least squares.

    With c = code - z the solution is s = Σ i w c / Σ i c² for each block. A block whose c are all zero keeps its
    present scale.
    """
    import torch

    centered = codes - zero_points[..., None]
    denominator = (centered.square() * importance).sum(dim=-1)
    numerator = (target * centered * importance).sum(dim=-1)
    solution = numerator / denominator.masked_fill(denominator == 0, 1.0)
    return round_to_fp16(torch.where(denominator == 0, scales, solution))


def search_scales(blocks: Tensor, scheme: QuantizationScheme, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the candidate scales and zero-points with the lowest `squared_error`, selected for each block."""
    import torch

    rows = max(1, CHUNK_WEIGHTS // blocks[0].numel())
    chunks = [_search_scales(chunk, scheme, importance) for chunk in torch.split(blocks, rows)]
    return torch.cat([scales for scales, _ in chunks]), torch.cat([zero_points for _, zero_points in chunks])


def _search_scales(blocks: Tensor, scheme: QuantizationScheme, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Search one chunk of rows."""
    import torch

    candidates = candidate_scales(blocks, scheme)
    best = next(candidates)
    lowest = squared_error(blocks, quantize(blocks, *best, scheme.bits), *best, importance)
    for scales, zero_points in candidates:
        codes = quantize(blocks, scales, zero_points, scheme.bits)
        error = squared_error(blocks, codes, scales, zero_points, importance)
        improved = error < lowest
        lowest = torch.where(improved, error, lowest)
        best = torch.where(improved, scales, best[0]), torch.where(improved, zero_points, best[1])
    return best


def channel_importance(statistic: Tensor | None, blocks: Tensor) -> Tensor:
    """Return the importance of each input channel, float32 of shape (blocks, block size).

    It is E[x²] relative to its mean over channels, or 1 for every channel if `statistic` is None. A small constant
    keeps unused channels above zero.

    Args:
        statistic: E[x²] of shape (columns,), or E[x xᵀ] of shape (columns, columns).
    """
    import torch

    if statistic is None:
        return torch.ones(blocks.shape[1:])
    second_moment = statistic.diagonal() if statistic.ndim == 2 else statistic
    relative = (second_moment / second_moment.mean().clamp(min=1e-30)).float()
    return (relative + 1e-4).reshape(blocks.shape[1:])


def to_quantized_matrix(codes: Tensor, scales: Tensor, zero_points: Tensor) -> QuantizedMatrix:
    """Convert codes in blocks, scales and zero-points to the types that a checkpoint stores."""
    import torch

    return QuantizedMatrix(
        codes=codes.flatten(1).to(torch.uint8), scales=scales, zero_points=zero_points.to(torch.uint8)
    )
