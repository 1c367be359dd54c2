"""Predict the decode time of a model from kernel times that were measured on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core.model_spec import EMBEDDING, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

MATRIX_SIDES = (128, 256, 512, 1024)
"""Side lengths of the timed square matrices."""
WORKING_SET_BYTES = (2**20, 2**22, 2**24, 2**25, 2**26, 2**28)
"""Timed sizes of the working set, the weights read per token. The size decides which cache level holds the weights, so
the sizes are closest together around the capacity of common last-level caches."""
FLOAT = "fp32"
_MEASURE_AGAIN = "Measure the device again with `edgeopt profile`"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """Times of one runtime on one device, measured by `edgeopt profile`.

    Attributes:
        threads: compute threads during the measurement.
        matrix: matrix-vector product times in microseconds by matrix kind (`fp32`, `int4/32` for 4 bits in blocks of
            32, `int8/static`). Shape (len(WORKING_SET_BYTES), len(MATRIX_SIDES)).
        layer: time of a layer without its matrix products: microseconds per layer, nanoseconds per hidden channel and
            nanoseconds per query head.
        token: time of a token outside the layers: microseconds per token and nanoseconds per vocabulary entry.
    """

    threads: int
    matrix: Mapping[str, tuple[tuple[float, ...], ...]]
    layer: tuple[float, float, float]
    token: tuple[float, float]

    def __post_init__(self) -> None:
        for name, rows in self.matrix.items():
            if [len(row) for row in rows] != [len(MATRIX_SIDES)] * len(WORKING_SET_BYTES):
                raise ConfigError(
                    f"`{name}` must have {len(WORKING_SET_BYTES)} rows of {len(MATRIX_SIDES)} times, got rows of "
                    f"{', '.join(str(len(row)) for row in rows)} times",
                    location=f"matrix.{name}",
                    hint=_MEASURE_AGAIN,
                )
        if (len(self.layer), len(self.token)) != (3, 2):
            raise ConfigError(
                f"`layer` must have 3 times and `token` 2 times, got {len(self.layer)} and {len(self.token)}",
                location="layer",
                hint=_MEASURE_AGAIN,
            )

    def decode_us(self, spec: ModelSpec) -> float:
        """Return the predicted microseconds of one token after a short prompt."""
        schemes = {name: spec.schemes.get(name) for name in spec.matrices}
        working_set_bytes = sum(bytes_per_token(spec, name, scheme) for name, scheme in schemes.items())
        units_us = sum(self.unit_us(spec, name, scheme, working_set_bytes) for name, scheme in schemes.items())
        return self.non_matrix_us(spec) + units_us

    def non_matrix_us(self, spec: ModelSpec) -> float:
        """Return the microseconds of one token without its matrix products."""
        layer_us, channel_ns, head_ns = self.layer
        token_us, entry_ns = self.token
        heads = sum(layer.heads for layer in spec.layers)
        layers_us = len(spec.layers) * (layer_us + 1e-3 * channel_ns * spec.hidden_size) + 1e-3 * head_ns * heads
        return layers_us + token_us + 1e-3 * entry_ns * spec.vocabulary_size

    def unit_us(self, spec: ModelSpec, name: str, scheme: QuantizationScheme | None, working_set_bytes: float) -> float:
        """Return the microseconds of the unit `name` in an engine that reads `working_set_bytes` per token.

        `scheme` is None for float weights. An embedding lookup reads one row and counts as 0.
        """
        if name == EMBEDDING:
            return 0.0
        products = 2 if name.endswith("gate_up") else 1
        weight_count = math.prod(spec.matrices[name]) / products
        times_us = [_product_us(row, weight_count) for row in self._rows(scheme)]
        log_sizes = [math.log(size) for size in WORKING_SET_BYTES]
        return products * _interpolate(log_sizes, times_us, math.log(max(1.0, working_set_bytes)))

    def _rows(self, scheme: QuantizationScheme | None) -> tuple[tuple[float, ...], ...]:
        try:
            return self.matrix[matrix_kind(scheme)]
        except KeyError as error:
            kinds = ", ".join(self.matrix) or "none"
            raise ConfigError(
                f"`kernels` must include times of {matrix_kind(scheme)} matrices, got {kinds}",
                location="target.kernels",
                hint=_MEASURE_AGAIN,
            ) from error


def matrix_kind(scheme: QuantizationScheme | None) -> str:
    """Return the key of `KernelTimes.matrix` for a scheme, `fp32` for float weights (None)."""
    if scheme is None:
        return FLOAT
    return f"int{scheme.bits}/{scheme.block_size if scheme.inputs == 'float' else scheme.inputs}"


def bytes_per_token(spec: ModelSpec, name: str, scheme: QuantizationScheme | None) -> int:
    """Return the bytes of the unit `name` that are read per token. The working set is the sum over all units."""
    return 0 if name == EMBEDDING else round(math.prod(spec.matrices[name]) * bytes_per_weight(scheme))


def bytes_per_weight(scheme: QuantizationScheme | None) -> float:
    """Return the bytes read per weight. A packed block includes its scale and the sum of its weights, both fp32."""
    if scheme is None:
        return 4.0
    return scheme.bits / 8 + (8 / scheme.block_size if scheme.inputs == "float" else 0.0)


def _product_us(times_us: tuple[float, ...], weight_count: float) -> float:
    """Return the microseconds of a product with a matrix of `weight_count` weights.

    Between timed sizes the time is interpolated log-log. Below the smallest it is constant, and above the largest it is
    proportional to the weights.
    """
    timed_counts = [side**2 for side in MATRIX_SIDES]
    if weight_count >= timed_counts[-1]:
        return times_us[-1] * weight_count / timed_counts[-1]
    log_counts, log_times = [math.log(n) for n in timed_counts], [math.log(us) for us in times_us]
    return math.exp(_interpolate(log_counts, log_times, math.log(weight_count)))


def _interpolate(xs: list[float], ys: list[float], x: float) -> float:
    """Return the piecewise linear interpolation of (xs, ys) at `x`, constant outside the range of xs."""
    for low, high, at_low, at_high in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= high:
            return at_low + (at_high - at_low) * max(0.0, x - low) / (high - low)
    return ys[-1]
