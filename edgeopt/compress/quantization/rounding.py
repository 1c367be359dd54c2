"""What ways of rounding a matrix onto a grid share: the port, and the arithmetic on blocks.

Blocks have shape (rows, blocks, block size); scales and zero-points (rows, blocks). Importance weighs the
squared error of each input channel, shape (columns,); its natural choice is the mean of x² (the diagonal
of GPTQ's Hessian).
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

SHRINKS = tuple(1.0 - 0.04 * n for n in range(14))
"""Shares of a block's range that are tried as clipping bounds."""
IN_CACHE = 2**16
"""Weights that are worked on at once, few enough to stay in a core's cache."""


class Rounding(Protocol):
    """A way to choose the whole numbers, scales and zero-points of a matrix."""

    INPUT_STATISTIC: ClassVar[InputStatistic]
    """What it wants to know of the matrix's input: nothing, the mean of x² a channel, or the mean of x xᵀ."""

    REMAINING_ERROR: ClassVar[float]
    """Share of what rounding to nearest does to perplexity that remains as a rule."""

    def round(self, weight: Tensor, grid: QuantizationScheme, statistic: Tensor | None) -> QuantizedMatrix:
        """Round `weight`, float32 (rows, columns). `statistic` is float64, (columns,) or (columns, columns)."""
        ...


def require_zeros_kept(spec: ModelSpec, how: Rounding) -> None:
    """ConfigError where `how` makes up for errors in weights that a sparse model holds at zero."""
    if how.INPUT_STATISTIC == "hessian":
        require_dense(spec, f"rounding by {type(how).__name__.lower()}", hint="Choose rounding=k_quant, rtn or hqq")


def blocked(weight: Tensor, block_size: int) -> Tensor:
    return weight.reshape(len(weight), -1, block_size)


def encode(blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers on the grid, as float, in the shape of `blocks`."""
    return ((blocks / scales[..., None]).round() + zero_points[..., None]).clamp(0, 2**bits - 1)


def decode(codes: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    return (codes - zero_points[..., None]) * scales[..., None]


def stored(scales: Tensor) -> Tensor:
    """Scales as an engine stores them: fp16, kept in its normal range."""
    import torch

    tiny, huge = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
    limited = torch.where(scales < 0, -1.0, 1.0) * scales.abs().clamp(tiny, huge)
    return limited.to(torch.float16).float()


def candidates(blocks: Tensor, grid: QuantizationScheme) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero-points that clip each block more and more tightly, the whole range first."""
    import torch

    top = 2**grid.bits - 1
    if grid.symmetric:
        middle = 2 ** (grid.bits - 1)
        farthest = blocks.abs().argmax(dim=-1, keepdim=True)
        extreme = blocks.gather(-1, farthest).squeeze(-1)
        zero_points = torch.full_like(extreme, middle)
        for shrink in SHRINKS:
            yield stored(-extreme * shrink / middle), zero_points  # the lowest code holds the largest value
            yield stored(extreme.abs() * shrink / (middle - 0.5)), zero_points
        return
    low, high = blocks.amin(dim=-1).clamp(max=0), blocks.amax(dim=-1).clamp(min=0)
    for shrink in SHRINKS:
        scales = stored((high - low) * shrink / top)
        yield scales, (-low * shrink / scales).round().clamp(0, top)


def error(blocks: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, importance: Tensor) -> Tensor:
    """Σ importance (w - ŵ)² of each block; `importance` has shape (blocks, block size)."""
    return ((blocks - decode(codes, scales, zero_points)).square() * importance).sum(dim=-1)


def fitted(target: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, importance: Tensor) -> Tensor:
    """Scales that bring `codes` nearest to `target` in weighted least squares, s = Σ i w c / Σ i c² for codes c about
    zero; `scales` where all codes are zero."""
    import torch

    centred = codes - zero_points[..., None]
    power = (centred.square() * importance).sum(dim=-1)
    solved = (target * centred * importance).sum(dim=-1) / power.masked_fill(power == 0, 1.0)
    return stored(torch.where(power == 0, scales, solved))


def best(blocks: Tensor, grid: QuantizationScheme, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Of the candidates, those scales and zero-points that lose least in each block."""
    import torch

    rows = max(1, IN_CACHE // blocks[0].numel())
    parts = [_best(part, grid, importance) for part in torch.split(blocks, rows)]
    return torch.cat([scales for scales, _ in parts]), torch.cat([zero_points for _, zero_points in parts])


def _best(blocks: Tensor, grid: QuantizationScheme, importance: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    tried = candidates(blocks, grid)
    chosen = next(tried)
    least = error(blocks, encode(blocks, *chosen, grid.bits), *chosen, importance)
    for scales, zero_points in tried:
        lost = error(blocks, encode(blocks, scales, zero_points, grid.bits), scales, zero_points, importance)
        better = lost < least
        least = torch.where(better, lost, least)
        chosen = torch.where(better, scales, chosen[0]), torch.where(better, zero_points, chosen[1])
    return chosen


def weights_of(statistic: Tensor | None, blocks: Tensor) -> Tensor:
    """Importance of each input channel in the shape (blocks, block size); all alike where nothing is known."""
    import torch

    if statistic is None:
        return torch.ones(blocks.shape[1:])
    energy = statistic.diagonal() if statistic.ndim == 2 else statistic
    relative = (energy / energy.mean().clamp(min=1e-30)).float()
    return (relative + 1e-4).reshape(blocks.shape[1:])


def assembled(codes: Tensor, scales: Tensor, zero_points: Tensor) -> QuantizedMatrix:
    """Codes in blocks, scales and zero-points in the types that a checkpoint stores."""
    import torch

    return QuantizedMatrix(
        codes=codes.flatten(1).to(torch.uint8), scales=scales, zero_points=zero_points.to(torch.uint8)
    )
