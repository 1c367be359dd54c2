from __future__ import annotations

import onnx
import pytest

from edgeopt.core.kernel_times import MATRIX_SIDES, WORKING_SET_BYTES, matrix_kind
from edgeopt.core.model_spec import QuantizationScheme
from edgeopt.machine import kernel_timing
from edgeopt.machine.contention import ContentionProbe

GRIDS = [
    None,
    QuantizationScheme(bits=4, block_size=256, symmetric=True),
    QuantizationScheme(bits=8, block_size=32, symmetric=True),
    QuantizationScheme(bits=8, block_size=256, symmetric=True, inputs="dynamic"),
    QuantizationScheme(bits=8, block_size=256, symmetric=True, inputs="static"),
]


def test_every_kind_is_timed_and_larger_matrices_take_longer():
    found = kernel_timing.time_matrix_kernels(
        GRIDS, threads=1, ram_bytes=2**24, read_gb_per_s=10.0, pace=ContentionProbe(), progress=lambda _: None
    )
    assert list(found) == [matrix_kind(grid) for grid in GRIDS]
    for rows in found.values():
        assert len(rows) == len(WORKING_SET_BYTES)
        assert {len(row) for row in rows} == {len(MATRIX_SIDES)}
        assert all(0 < row[0] < row[-1] for row in rows)
        assert all(list(column) == sorted(column) for column in zip(*rows, strict=True)), "more bytes take no less"


def test_a_machine_too_small_for_long_chains_is_bound_by_its_bandwidth():
    (rows,) = kernel_timing.time_matrix_kernels(
        [None], threads=1, ram_bytes=2**20, read_gb_per_s=0.001, pace=ContentionProbe(), progress=lambda _: None
    ).values()
    assert rows[-1] == pytest.approx([4 * side**2 for side in MATRIX_SIDES]), (
        "4 bytes at 1e6 bytes a second, in microseconds"
    )


@pytest.mark.parametrize("grid", GRIDS, ids=matrix_kind)
def test_a_chain_keeps_the_size_of_its_numbers(grid):
    import numpy as np
    import onnxruntime

    chain = kernel_timing._chain(grid, 256, 24)
    session = onnxruntime.InferenceSession(chain, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x0": np.ones((1, 1, 256), np.float32)})
    assert 0.02 < float(np.sqrt((found**2).mean())) < 50
    assert len(onnx.load_from_string(chain).graph.initializer) >= 24, "no weights are shared"
