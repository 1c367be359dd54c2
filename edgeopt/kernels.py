"""What decoding a token costs on a device: measured times of its kernels, and predictions from them by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.errors import ConfigError
from edgeopt.spec import EMBEDDING, Grid, ModelSpec

SIDES = (128, 256, 512, 1024)
"""Sides of the square matrices that are timed while a cache holds all of them."""
WORKING_SETS = (2**20, 2**24, 2**27, 2**29)
"""Bytes of all weights that a token reads: in the first a matrix takes no longer than in a cache."""
FLOAT = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Times of one runtime on one device, measured by `edgeopt profile`.

    Attributes:
        threads: compute threads that they hold for.
        matrix: by kind of matrix (`fp32`, `int4/32` for 4 bits in blocks of 32, `int8/static`): microseconds of a
            product at each of `SIDES`, then picoseconds more for each weight at each but the first of `WORKING_SETS`.
        layer: microseconds of what a layer does beside its matrices, and nanoseconds more for each hidden channel.
        token: microseconds of what a token costs beside its layers, and nanoseconds more for each vocabulary entry.
    """

    threads: int
    matrix: Mapping[str, tuple[float, ...]]
    layer: tuple[float, ...]
    token: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, row in self.matrix.items():
            if len(row) != len(SIDES) + len(WORKING_SETS) - 1:
                raise ConfigError(
                    f"{len(row)} times are not {len(SIDES) + len(WORKING_SETS) - 1}",
                    place=f"matrix.{name}",
                    mend="Measure the device again: edgeopt profile",
                )

    def decode_us(self, spec: ModelSpec) -> float:
        """Microseconds of one token after a short prompt."""
        grids = {name: spec.grids.get(name) for name in spec.matrices}
        read = sum(read_bytes(spec, name, grid) for name, grid in grids.items())
        return self.beside_us(spec) + sum(self.unit_us(spec, name, grid, read) for name, grid in grids.items())

    def beside_us(self, spec: ModelSpec) -> float:
        """Microseconds of one token without its matrices."""
        layers = len(spec.layers) * (self.layer[0] + 1e-3 * self.layer[1] * spec.hidden_size)
        return layers + self.token[0] + 1e-3 * self.token[1] * spec.vocabulary_size

    def unit_us(self, spec: ModelSpec, name: str, grid: Grid | None, working_set: float) -> float:
        """Microseconds that the unit `name` takes on `grid` (None: in float) in an engine of `working_set` bytes.

        Of an embedding one row is read, which takes no time that could be seen.
        """
        if name == EMBEDDING:
            return 0.0
        calls = 2 if name.endswith("gate_up") else 1
        weights = math.prod(spec.matrices[name]) / calls
        times = self._times(grid)
        return calls * (_cached_us(times, weights) + 1e-6 * _slower_ps(times, working_set) * weights)

    def _times(self, grid: Grid | None) -> tuple[float, ...]:
        try:
            return self.matrix[kind(grid)]
        except KeyError as error:
            raise ConfigError(
                f"no times of {kind(grid)} matrices were measured",
                place="target.kernels",
                mend="Measure the device again: edgeopt profile",
            ) from error


def kind(grid: Grid | None) -> str:
    """The kind of matrix that a device's times are listed by; fp16 is computed in fp32."""
    if grid is None:
        return FLOAT
    return f"int{grid.bits}/{grid.block_size if grid.inputs == 'float' else grid.inputs}"


def read_bytes(spec: ModelSpec, name: str, grid: Grid | None) -> int:
    """Bytes of the unit `name` on `grid` that each token reads; all units together are the working set."""
    if name == EMBEDDING:
        return 0
    return 4 * math.prod(spec.matrices[name]) if grid is None else grid.size_bytes(*spec.matrices[name])


def _cached_us(times: tuple[float, ...], weights: float) -> float:
    """A product's time in a cache: a straight line in logarithms between two sides, and beyond them as at the end."""
    known = [side**2 for side in SIDES]
    if weights >= known[-1]:
        return times[len(SIDES) - 1] * weights / known[-1]
    return math.exp(
        _line([math.log(n) for n in known], [math.log(us) for us in times[: len(SIDES)]], math.log(weights))
    )


def _slower_ps(times: tuple[float, ...], working_set: float) -> float:
    """How much longer each weight takes among as many bytes, linear in their logarithm."""
    return _line([math.log(n) for n in WORKING_SETS], [0.0, *times[len(SIDES) :]], math.log(max(1.0, working_set)))


def _line(xs: list[float], ys: list[float], x: float) -> float:
    """Between two points of a rising curve; before and after them its ends."""
    for low, high, at_low, at_high in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= high:
            return at_low + (at_high - at_low) * max(0.0, x - low) / (high - low)
    return ys[-1]
