"""Build the key-value cache into an exported graph, as buffers to which the graph writes the new tokens.

If a session binds the same buffer as input and output, the graph updates it in place. A quantized cache stores int8 or
int4 codes with one scale per block of channels, which maps the block's largest magnitude to the largest code. Like KIVI
(arXiv 2402.02750), it also keeps the most recent tokens in floating point, because attention weights them most.
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
"""Channels that share a scale. Head sizes that it does not divide use their greatest common divisor with it."""
MIN_SCALE = 2.0**-24
"""The smallest positive fp16 number."""


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cached keys and values of one layer, in the interface of transformers.

    Args:
        length: number of cached tokens, which is also the slot of the next token.
        position: position of the next token in the text. It exceeds `length` once a window has dropped tokens.
        sliding: the layer attends to a sliding window.
    """

    is_compileable = True

    def __init__(
        self, keys: StateCache, values: StateCache, length: Tensor, position: Tensor, *, sliding: bool
    ) -> None:
        super().__init__()
        self.caches = keys, values
        self.length, self.position = length, position
        self.is_initialized, self.is_sliding = True, sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing, because the buffers are inputs of the graph."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new keys and values, and return all cached ones."""
        keys, values = (
            cache.write(states, self.length, self.position)
            for cache, states in zip(self.caches, (key_states, value_states), strict=True)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the attention mask, which covers the whole capacity from slot 0."""
        return self.caches[0].buffers[0].shape[2], 0

    def get_seq_length(self) -> Tensor:
        """Return the number of cached tokens."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1, which denotes a dynamic capacity."""
        return -1


class StateCache(Protocol):
    """The cached keys, or the cached values, of one layer.

    Attributes:
        buffers: the inputs of the graph; after `write`, its outputs.
    """

    buffers: list[Tensor]

    def write(self, states: Tensor, length: Tensor, position: Tensor) -> Tensor:
        """Write `states` to the slots from `length` on and return the whole cache.

        Args:
            states: states of the new tokens, shape (batch, heads, tokens, head_size).
            length: number of cached tokens, scalar.
            position: position of the first new token in the text, scalar.

        Returns:
            Shape (batch, heads, capacity, head_size).
        """
        ...


def wrap_buffers(cache_type: str, buffers: Sequence[Tensor]) -> StateCache:
    """Return the cache of type `cache_type` on `buffers`, in the order of `graph.CACHE_SUFFIXES`."""
    return QuantizedCache(BITS[cache_type], buffers) if cache_type in BITS else FloatCache(buffers)


def example_buffers(
    cache_type: str, *, batch: int, heads: int, capacity: int, recent: int, head_size: int
) -> list[Tensor]:
    """Return zero-filled buffers for the keys or values of one layer, in the order of `graph.CACHE_SUFFIXES`."""
    shape = batch, heads, capacity
    if cache_type not in BITS:
        return [torch.zeros(*shape, head_size, dtype=torch.float16 if cache_type == "fp16" else torch.float32)]
    codes, scales = QuantizedCache(BITS[cache_type], []).quantize(torch.zeros(*shape, head_size))
    return [codes, scales, torch.zeros(batch, heads, recent, head_size)]


class FloatCache:
    """States in the floating-point type of the buffer."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.buffers = list(buffers)

    def write(self, states: Tensor, length: Tensor, position: Tensor) -> Tensor:
        (buffer,) = self.buffers
        buffer = _scatter_tokens(buffer, torch.arange(states.shape[2]) + length, states.to(buffer.dtype))
        self.buffers = [buffer]
        return buffer.to(states.dtype)


class QuantizedCache:
    """States stored as int8 codes or as pairs of int4 codes, with the most recent ones also in floating point.

    A ring buffer holds the recent states, which attention reads instead of their codes. New tokens are written to the
    ring before it is read.
    """

    def __init__(self, bits: int, buffers: Sequence[Tensor]) -> None:
        self._bits, self.buffers = bits, list(buffers)
        self._max_code = 2 ** (bits - 1) - 1

    def write(self, states: Tensor, length: Tensor, position: Tensor) -> Tensor:
        codes, scales, recent = self.buffers
        tokens, ring = torch.arange(states.shape[2]), torch.arange(recent.shape[2])
        new_codes, new_scales = self.quantize(states)
        codes, scales = (
            _scatter_tokens(buffer, tokens + length, new) for buffer, new in ((codes, new_codes), (scales, new_scales))
        )
        ring_slots = ring[-1] + 1  # a tensor, because the exporter does not support `%` with a dynamic size
        recent = _scatter_tokens(recent, (tokens + position) % ring_slots, states)
        self.buffers = [codes, scales, recent]
        last_position = position + states.shape[2] - 1
        positions = last_position - (last_position - ring) % ring_slots  # text position of the state in each ring slot
        # An empty ring slot has a negative position. It is written to a cache slot that no token attends to yet.
        slots = torch.where(positions < 0, ring, positions - position + length)
        return _scatter_tokens(self.dequantize(codes, scales), slots, recent)

    def quantize(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes, as int8 or as two int4 per uint8, and the scale of each block in fp16."""
        block_size = math.gcd(states.shape[-1], BLOCK_SIZE)
        blocks = states.reshape(*states.shape[:-1], -1, block_size)
        scales = (blocks.abs().amax(-1) / self._max_code).clamp(min=MIN_SCALE).half()
        codes = (blocks / scales.float().unsqueeze(-1)).round().clamp(-self._max_code, self._max_code).flatten(-2)
        if self._bits == 8:
            return codes.to(torch.int8), scales
        low, high = (codes + 8).chunk(2, -1)
        return (low + 16 * high).to(torch.uint8), scales

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the states that `codes` and `scales` represent, in fp32."""
        values = codes.float()
        if self._bits == 4:
            high = (values / 16).floor()
            values = torch.cat([values - 16 * high, high], -1) - 8
        blocks = values.reshape(*values.shape[:-1], scales.shape[-1], -1)
        return (blocks * scales.float().unsqueeze(-1)).flatten(-2)


def _scatter_tokens(buffer: Tensor, slots: Tensor, states: Tensor) -> Tensor:
    """Return `buffer` with the state of each token written to its slot along axis 2."""
    return buffer.scatter(2, slots[None, None, :, None].expand(states.shape), states)
