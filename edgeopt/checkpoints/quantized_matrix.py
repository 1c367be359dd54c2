"""Represent quantized matrices: integer codes with a scale and a zero-point for each block along the input dimension.

Compression quantizes, checkpoints store the codes and runtimes pack them into engines. All of them compute the same
weights, (code - zero_point) * scale, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLOCK_SIZES: Mapping[int, tuple[int, ...]] = {8: (16, 32, 64, 128, 256), 4: (16, 32, 64, 128, 256), 2: (32, 64, 128)}
"""Block sizes with a kernel in ONNX Runtime, by bits. A 2-bit product in other block sizes takes 50 times as long."""
_TENSORS = ("codes", "scales", "zero_points")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """Integer codes of a matrix with a scale and a zero-point per block.

    Attributes:
        codes: uint8, shape (rows, columns).
        scales: float32 with values exact in fp16, shape (rows, blocks).
        zero_points: uint8, shape (rows, blocks).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    @property
    def weight(self) -> Tensor:
        """Return the dequantized matrix, float32, shape (rows, columns)."""
        blocks = self.codes.reshape(*self.scales.shape, -1).float()
        weight: Tensor = ((blocks - self.zero_points.float()[..., None]) * self.scales[..., None]).flatten(1)
        return weight

    def split(self, rows: Sequence[int]) -> list[QuantizedMatrix]:
        """Split the matrix into matrices with the given numbers of rows."""
        tensors = [getattr(self, name).split(list(rows)) for name in _TENSORS]
        return [QuantizedMatrix(codes=c, scales=s, zero_points=z) for c, s, z in zip(*tensors, strict=True)]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores for the module `name`, by tensor name."""
        return {f"{name}.{tensor}": getattr(self, tensor).contiguous() for tensor in _TENSORS}


def stack(matrices: Iterable[QuantizedMatrix]) -> QuantizedMatrix:
    """Concatenate matrices with the same input along their rows."""
    import torch

    listed = list(matrices)
    codes, scales, zero_points = (torch.cat([getattr(matrix, name) for matrix in listed]) for name in _TENSORS)
    return QuantizedMatrix(codes=codes, scales=scales, zero_points=zero_points)


def quantized_matrices(state: Mapping[str, Tensor]) -> dict[str, QuantizedMatrix]:
    """Return the quantized matrices among the tensors of a checkpoint, by module name."""
    names = [key.removesuffix(".codes") for key in state if key.endswith(".codes")]
    return {name: QuantizedMatrix(**{tensor: state[f"{name}.{tensor}"] for tensor in _TENSORS}) for name in names}


def dequantize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with every quantized matrix replaced by its float weights."""
    floats = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in _TENSORS}
    return floats | {f"{name}.weight": matrix.weight for name, matrix in quantized_matrices(state).items()}


def pack(codes: Tensor, bits: int) -> np.ndarray:
    """Pack codes of `bits` bits into bytes along the last axis, lowest bits first, padded with zeros."""
    import numpy as np

    array, per_byte = codes.numpy(), 8 // bits
    padding = -array.shape[-1] % per_byte
    padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)])
    packed = np.zeros((*padded.shape[:-1], padded.shape[-1] // per_byte), np.uint8)
    for position in range(per_byte):
        packed |= padded[..., position::per_byte] << np.uint8(bits * position)
    return packed
