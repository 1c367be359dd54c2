"""Keys and values in an exported graph: in buffers that it gets and writes at the places of the new tokens.

A session that binds a buffer as input and output at once has it written in place, and nothing is ever copied. In whole
numbers a block of channels has a scale of its own, its largest magnitude over the largest code; the last tokens, which
are attended to most, are kept as they are beside (as in KIVI, Liu et al. 2024, arXiv:2402.02750).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32
"""Channels of a head that share a scale, or fewer where that does not divide the head."""
LEAST_SCALE = 2.0**-24
"""The smallest number above zero in fp16."""


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, of which `length` slots are written.

    Args:
        position: the place in the text of the next token. Slots of what was forgotten are used again, so that it may
            be more than `length`.
    """

    is_compileable = True

    def __init__(self, keys: Kept, values: Kept, length: Tensor, position: Tensor, *, sliding: bool) -> None:
        super().__init__()
        self.kept = keys, values
        self.length, self.position = length, position
        self.is_initialized, self.is_sliding = True, sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are given."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = (
            kept.write(states, self.length, self.position)
            for kept, states in zip(self.kept, (key_states, value_states), strict=True)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kept[0].buffers[0].shape[2], 0

    def get_seq_length(self) -> Tensor:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Kept(Protocol):
    """Keys or values of one layer.

    Attributes:
        buffers: what a graph gets, and after `write` what it gives back.
    """

    buffers: list[Tensor]

    def write(self, states: Tensor, length: Tensor, position: Tensor) -> Tensor:
        """Keep `states` (batch, heads, tokens, head size) behind `length` others; all that is kept, in their type."""
        ...


def kept(form: str, buffers: Sequence[Tensor]) -> Kept:
    return Coded(BITS[form], buffers) if form in BITS else Plain(buffers)


def examples(form: str, *, batch: int, heads: int, capacity: int, recent: int, head_size: int) -> list[Tensor]:
    """Buffers of keys or values of one layer, in the order of graph.CACHE_SUFFIXES."""
    shape = batch, heads, capacity
    if form not in BITS:
        return [torch.zeros(*shape, head_size, dtype=torch.float16 if form == "fp16" else torch.float32)]
    coded = Coded(BITS[form], [])
    codes, scales = coded.code(torch.zeros(*shape, head_size))
    return [codes, scales, torch.zeros(batch, heads, recent, head_size)]


class Plain:
    """As they are, or rounded to the buffer's type."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.buffers = list(buffers)

    def write(self, states: Tensor, length: Tensor, position: Tensor) -> Tensor:
        (buffer,) = self.buffers
        buffer = _scattered(buffer, torch.arange(states.shape[2]) + length, states.to(buffer.dtype))
        self.buffers = [buffer]
        return buffer.to(states.dtype)


class Coded:
    """In `bits` of whole numbers, two of 4 bits to a byte, and the last tokens as they are in a ring beside.

    Of those the graph reads as many at least as the ring has slots without those of the tokens that it is given.
    """

    def __init__(self, bits: int, buffers: Sequence[Tensor]) -> None:
        self._bits, self.buffers = bits, list(buffers)
        self._largest = 2 ** (bits - 1) - 1

    def write(self, states: Tensor, length: Tensor, position: Tensor) -> Tensor:
        codes, scales, recent = self.buffers
        tokens, ring = torch.arange(states.shape[2]), torch.arange(recent.shape[2])
        new_codes, new_scales = self.code(states)
        codes, scales = (
            _scattered(buffer, tokens + length, new) for buffer, new in ((codes, new_codes), (scales, new_scales))
        )
        slots = ring[-1] + 1  # a tensor, since the exporter takes no remainder by a size
        recent = _scattered(recent, (tokens + position) % slots, states)
        self.buffers = [codes, scales, recent]
        last = position + states.shape[2] - 1
        held = last - (last - ring) % slots  # the position of what each slot of the ring holds
        places = torch.where(held < 0, ring, held - position + length)  # an empty one's place is not read yet
        return _scattered(self.decode(codes, scales), places, recent)

    def code(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int8 or packed in uint8, and scales of their blocks, fp16."""
        size = math.gcd(states.shape[-1], BLOCK_SIZE)
        blocks = states.reshape(*states.shape[:-1], -1, size)
        scales = (blocks.abs().amax(-1) / self._largest).clamp(min=LEAST_SCALE).half()
        codes = (blocks / scales.float().unsqueeze(-1)).round().clamp(-self._largest, self._largest).flatten(-2)
        if self._bits == 8:
            return codes.to(torch.int8), scales
        low, high = (codes + 8).chunk(2, -1)
        return (low + 16 * high).to(torch.uint8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        numbers = codes.float()
        if self._bits == 4:
            high = (numbers / 16).floor()
            numbers = torch.cat([numbers - 16 * high, high], -1) - 8
        blocks = numbers.reshape(*numbers.shape[:-1], scales.shape[-1], -1)
        return (blocks * scales.float().unsqueeze(-1)).flatten(-2)


def _scattered(buffer: Tensor, places: Tensor, states: Tensor) -> Tensor:
    """The buffer with the states of each token at the places, (tokens,), of its third axis."""
    return buffer.scatter(2, places[None, None, :, None].expand(states.shape), states)
