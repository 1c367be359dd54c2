"""Check that the overhead of layers and tokens is fitted to decode times of engines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import specs

from edgeopt.checkpoints.quantized_matrix import BLOCK_SIZES
from edgeopt.core.kernel_times import WORKING_SET_BYTES, KernelTimes
from edgeopt.machine.contention import ContentionProbe
from edgeopt.studies import kernel_profile

TIMES = tuple(tuple(us * (1 + 0.2 * row) for us in (1.0, 2.0, 4.0, 8.0)) for row in range(len(WORKING_SET_BYTES)))
TRUE = KernelTimes(
    threads=1,
    matrix={f"int{bits}/{block}": TIMES for bits, blocks in BLOCK_SIZES.items() for block in blocks},
    layer=(12.0, 30.0, 400.0),
    token=(5.0, 2.0),
)
WITHOUT_OVERHEAD = replace(TRUE, layer=(0.0, 0.0, 0.0), token=(0.0, 0.0))


def test_overhead_is_fitted_from_engine_times():
    profiled = kernel_profile.profiled_specs()
    fitted = kernel_profile.fit_overhead(WITHOUT_OVERHEAD, profiled, [TRUE.decode_us(spec) for spec in profiled])
    assert fitted.layer == pytest.approx(TRUE.layer, rel=1e-3)
    assert fitted.token == pytest.approx(TRUE.token, rel=1e-3)


def test_fitted_overhead_is_never_negative():
    profiled = kernel_profile.profiled_specs()
    decode_us = [0.5 * WITHOUT_OVERHEAD.decode_us(spec) for spec in profiled]
    assert kernel_profile.fit_overhead(WITHOUT_OVERHEAD, profiled, decode_us) == WITHOUT_OVERHEAD


def test_random_engine_decodes():
    spec = replace(kernel_profile.profiled_specs()[0], layers=specs.llama().layers, hidden_size=64, head_size=16)
    schemes = {name: scheme for name, scheme in spec.schemes.items() if name in spec.matrices}
    assert 0 < kernel_profile._decode_s(replace(spec, schemes=schemes), 1, ContentionProbe()) < 1
