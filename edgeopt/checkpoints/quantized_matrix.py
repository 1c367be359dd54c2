"""Matrices on a grid: whole numbers with a scale and a zero-point for each block along the input side.

Compression rounds onto a grid, checkpoints carry the numbers, and runtimes pack them into engines: all
three compute the same weights, (code - zero_point) * scale, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLOCK_SIZES: Mapping[int, tuple[int, ...]] = {8: (16, 32, 64, 128, 256), 4: (16, 32, 64, 128, 256), 2: (32, 64, 128)}
"""By bits, for which ONNX Runtime has kernels: of 2 bits in other blocks a product takes 50 times as long."""
_PARTS = ("codes", "scales", "zero_points")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """A matrix on its grid.

    Attributes:
        codes: uint8, shape (rows, columns).
        scales: float32 whose values are exact in fp16, shape (rows, blocks).
        zero_points: uint8, shape (rows, blocks).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    @property
    def weight(self) -> Tensor:
        """float32, shape (rows, columns)."""
        blocks = self.codes.reshape(*self.scales.shape, -1).float()
        weight: Tensor = ((blocks - self.zero_points.float()[..., None]) * self.scales[..., None]).flatten(1)
        return weight

    def split(self, rows: Sequence[int]) -> list[QuantizedMatrix]:
        """The matrix cut along its rows, as many to each part as `rows` says."""
        parts = [getattr(self, part).split(list(rows)) for part in _PARTS]
        return [QuantizedMatrix(codes=c, scales=s, zero_points=z) for c, s, z in zip(*parts, strict=True)]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint stores in place of the matrix `name`."""
        return {f"{name}.{part}": getattr(self, part).contiguous() for part in _PARTS}


def stack(parts: Iterable[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices that read the same input, one below the other."""
    import torch

    listed = list(parts)
    codes, scales, zero_points = (torch.cat([getattr(part, name) for part in listed]) for name in _PARTS)
    return QuantizedMatrix(codes=codes, scales=scales, zero_points=zero_points)


def rounded(state: Mapping[str, Tensor]) -> dict[str, QuantizedMatrix]:
    """The matrices of a checkpoint's tensors that are on a grid, by the names of their modules."""
    names = [key.removesuffix(".codes") for key in state if key.endswith(".codes")]
    return {name: QuantizedMatrix(**{part: state[f"{name}.{part}"] for part in _PARTS}) for name in names}


def dequantize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with the float weights that its grids stand for."""
    floats = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in _PARTS}
    return floats | {f"{name}.weight": matrix.weight for name, matrix in rounded(state).items()}


def pack(codes: Tensor, bits: int) -> np.ndarray:
    """Codes of `bits` packed into bytes along the last axis, the first in the lowest bits, padded with zeros."""
    import numpy as np

    array, per_byte = codes.numpy(), 8 // bits
    short = -array.shape[-1] % per_byte
    padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, short)])
    packed = np.zeros((*padded.shape[:-1], padded.shape[-1] // per_byte), np.uint8)
    for position in range(per_byte):
        packed |= padded[..., position::per_byte] << np.uint8(bits * position)
    return packed
