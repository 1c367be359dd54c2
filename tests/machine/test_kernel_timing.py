from __future__ import annotations

import onnx
import pytest

from edgeopt.core.kernel_times import MATRIX_SIDES, WORKING_SET_BYTES, matrix_kind
from edgeopt.core.model_spec import QuantizationScheme
from edgeopt.machine import kernel_timing
from edgeopt.machine.contention import ContentionProbe

SCHEMES = [
    None,
    QuantizationScheme(bits=4, block_size=256, symmetric=True),
    QuantizationScheme(bits=8, block_size=32, symmetric=True),
    QuantizationScheme(bits=8, block_size=256, symmetric=True, inputs="dynamic"),
    QuantizationScheme(bits=8, block_size=256, symmetric=True, inputs="static"),
]


def test_times_increase_with_matrix_and_working_set():
    times = kernel_timing.time_matrix_kernels(
        SCHEMES, threads=1, ram_bytes=2**24, read_gb_per_s=10.0, probe=ContentionProbe(), progress=lambda _: None
    )
    assert list(times) == [matrix_kind(scheme) for scheme in SCHEMES]
    for rows in times.values():
        assert len(rows) == len(WORKING_SET_BYTES)
        assert {len(row) for row in rows} == {len(MATRIX_SIDES)}
        assert all(0 < row[0] < row[-1] for row in rows)
        assert all(list(column) == sorted(column) for column in zip(*rows, strict=True)), "more bytes never take less"


def test_small_memory_falls_back_to_read_bandwidth():
    (rows,) = kernel_timing.time_matrix_kernels(
        [None], threads=1, ram_bytes=2**20, read_gb_per_s=0.001, probe=ContentionProbe(), progress=lambda _: None
    ).values()
    expected = [4 * side**2 for side in MATRIX_SIDES]  # microseconds: 4 bytes per weight at 1e6 bytes per second
    assert rows[-1] == pytest.approx(expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=matrix_kind)
def test_chain_preserves_magnitude(scheme):
    import numpy as np
    import onnxruntime

    chain = kernel_timing._build_chain(scheme, 256, 24)
    session = onnxruntime.InferenceSession(chain, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x0": np.ones((1, 1, 256), np.float32)})
    assert 0.02 < float(np.sqrt((output**2).mean())) < 50
    assert len(onnx.load_from_string(chain).graph.initializer) >= 24, "no weights are shared"
