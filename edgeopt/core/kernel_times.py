"""What decoding a token costs on a device: measured times of its kernels, and predictions from them by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.model_spec import EMBEDDING, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

MATRIX_SIDES = (128, 256, 512, 1024)
"""Sides of the square matrices that are timed."""
WORKING_SET_BYTES = (2**20, 2**22, 2**24, 2**25, 2**26, 2**28)
"""Bytes of all weights that a token reads, which decide whether a cache still holds them: closer together where most
of the last-level caches end."""
FLOAT = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """Times of one runtime on one device, measured by `edgeopt profile`.

    Attributes:
        threads: compute threads that they hold for.
        matrix: by kind of matrix (`fp32`, `int4/32` for 4 bits in blocks of 32, `int8/static`): microseconds of a
            product, a row for each of `WORKING_SETS`, in it an entry for each of `SIDES`.
        layer: microseconds of what a layer does beside its matrices, and nanoseconds more for each hidden channel and
            for each query head.
        token: microseconds of what a token costs beside its layers, and nanoseconds more for each vocabulary entry.
    """

    threads: int
    matrix: Mapping[str, tuple[tuple[float, ...], ...]]
    layer: tuple[float, float, float]
    token: tuple[float, float]

    def __post_init__(self) -> None:
        for name, rows in self.matrix.items():
            if [len(row) for row in rows] != [len(MATRIX_SIDES)] * len(WORKING_SET_BYTES):
                raise ConfigError(
                    f"its times are no {len(WORKING_SET_BYTES)} rows of {len(MATRIX_SIDES)}",
                    location=f"matrix.{name}",
                    hint="Measure the device again: edgeopt profile",
                )
        if (len(self.layer), len(self.token)) != (3, 2):
            raise ConfigError(
                f"{len(self.layer)} times of a layer and {len(self.token)} of a token are not 3 and 2",
                location="layer",
                hint="Measure the device again: edgeopt profile",
            )

    def decode_us(self, spec: ModelSpec) -> float:
        """Microseconds of one token after a short prompt."""
        schemes = {name: spec.schemes.get(name) for name in spec.matrices}
        read = sum(bytes_per_token(spec, name, grid) for name, grid in schemes.items())
        return self.non_matrix_us(spec) + sum(self.unit_us(spec, name, grid, read) for name, grid in schemes.items())

    def non_matrix_us(self, spec: ModelSpec) -> float:
        """Microseconds of one token without its matrices."""
        each_us, channel_ns, head_ns = self.layer
        heads = sum(layer.heads for layer in spec.layers)
        layers = len(spec.layers) * (each_us + 1e-3 * channel_ns * spec.hidden_size) + 1e-3 * head_ns * heads
        return layers + self.token[0] + 1e-3 * self.token[1] * spec.vocabulary_size

    def unit_us(self, spec: ModelSpec, name: str, grid: QuantizationScheme | None, working_set: float) -> float:
        """Microseconds that the unit `name` takes on `grid` (None: in float) in an engine of `working_set` bytes.

        Of an embedding one row is read, which takes no time that could be seen.
        """
        if name == EMBEDDING:
            return 0.0
        calls = 2 if name.endswith("gate_up") else 1
        weights = math.prod(spec.matrices[name]) / calls
        found = [_product_us(row, weights) for row in self._times(grid)]
        return calls * _line([math.log(n) for n in WORKING_SET_BYTES], found, math.log(max(1.0, working_set)))

    def _times(self, grid: QuantizationScheme | None) -> tuple[tuple[float, ...], ...]:
        try:
            return self.matrix[matrix_kind(grid)]
        except KeyError as error:
            raise ConfigError(
                f"no times of {matrix_kind(grid)} matrices were measured",
                location="target.kernels",
                hint="Measure the device again: edgeopt profile",
            ) from error


def matrix_kind(grid: QuantizationScheme | None) -> str:
    """The kind of matrix that a device's times are listed by; fp16 is computed in fp32."""
    if grid is None:
        return FLOAT
    return f"int{grid.bits}/{grid.block_size if grid.inputs == 'float' else grid.inputs}"


def bytes_per_token(spec: ModelSpec, name: str, grid: QuantizationScheme | None) -> int:
    """Bytes of the unit `name` on `grid` that each token reads; all units together are the working set."""
    return 0 if name == EMBEDDING else round(math.prod(spec.matrices[name]) * bytes_per_weight(grid))


def bytes_per_weight(grid: QuantizationScheme | None) -> float:
    """Bytes that are read for each weight: packed blocks have a scale and the sum of their weights beside, in fp32."""
    if grid is None:
        return 4.0
    return grid.bits / 8 + (8 / grid.block_size if grid.inputs == "float" else 0.0)


def _product_us(times: tuple[float, ...], weights: float) -> float:
    """A straight line in logarithms between two sides, and beyond them as long for each weight as at the last."""
    known = [side**2 for side in MATRIX_SIDES]
    if weights >= known[-1]:
        return times[-1] * weights / known[-1]
    return math.exp(_line([math.log(n) for n in known], [math.log(us) for us in times], math.log(weights)))


def _line(xs: list[float], ys: list[float], x: float) -> float:
    """Between two points of a rising curve; before and after them its ends."""
    for low, high, at_low, at_high in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= high:
            return at_low + (at_high - at_low) * max(0.0, x - low) / (high - low)
    return ys[-1]
