"""How long ONNX Runtime's CPU kernels take to multiply one vector by a matrix, which is most of decoding.

Chains of equal matrices are timed, as one product has to wait for the one before it in a model too. All their
weights are read once a run, so that a long chain finds its weights in memory and a short one in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

from edgeopt.core.kernel_times import MATRIX_SIDES, WORKING_SET_BYTES, bytes_per_weight, matrix_kind
from edgeopt.core.protocols import Progress
from edgeopt.machine.contention import ContentionProbe, select_undisturbed

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.model_spec import QuantizationScheme

TIMED_S, STRETCH_S = 0.05, 0.02
LEAST_RUNS = 5
PATIENCE = 8
"""How many times as long as needed is waited for moments at a usual pace."""
PASSES = 3
"""How often a chain is timed, at different moments, of which the median counts: what disturbs one of them is not taken
for the kernel, nor a moment in which a host's cache was free for what it has to share as a rule."""
PRODUCTS = (4, 1024)
"""Products in a chain, at least for its start to weigh little, and at most for its session to be made in seconds."""
LEAST_SIDE = 8
"""Of a matrix whose product takes nothing that could be seen."""
HEADROOM = 8
"""A chain is held some times over while its session is made: as model, as tensors and packed."""


def time_matrix_kernels(
    schemes: Iterable[QuantizationScheme | None],
    *,
    threads: int,
    ram_bytes: int,
    read_gb_per_s: float,
    pace: ContentionProbe,
    progress: Progress,
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """The times of each kind of matrix, as edgeopt.core.kernel_times.KernelTimes lists them.

    Where a chain would be too long, each weight is taken to be slowed down among so many bytes as those of the largest
    matrices are; where the machine has too little memory for it, as reading it at `read_gb_per_s` makes it.
    `pace` tells which moments count.
    """
    import numpy as np

    found: dict[str, list[np.ndarray]] = {}
    for _ in range(PASSES):
        for grid in schemes:
            progress(f"timing {matrix_kind(grid)} matrices")
            found.setdefault(matrix_kind(grid), []).append(
                np.array(_timed(grid, threads, ram_bytes, read_gb_per_s, pace))
            )
    times = {}
    for name, passes in found.items():
        rising = np.maximum.accumulate(np.maximum.accumulate(np.median(passes, axis=0), axis=0), axis=1)
        times[name] = tuple(tuple(round(1e6 * float(s), 3) for s in row) for row in rising)
    return times


def _timed(
    grid: QuantizationScheme | None, threads: int, ram_bytes: int, read_gb_per_s: float, pace: ContentionProbe
) -> list[list[float]]:
    """Seconds of a product, a row for each working set."""
    known: dict[tuple[int, int], float] = {}
    rows: list[list[float]] = []
    for size in WORKING_SET_BYTES:
        row: list[float] = []
        for side in reversed(MATRIX_SIDES):
            weights = side**2
            count = max(PRODUCTS[0], round(size / bytes_per_weight(grid) / weights))
            if count > PRODUCTS[1]:
                slower_s = (row[0] - rows[-1][-1]) / MATRIX_SIDES[-1] ** 2
                row.append(rows[-1][MATRIX_SIDES.index(side)] + max(0.0, slower_s) * weights)
            elif rows and size * HEADROOM > ram_bytes:
                row.append(
                    max(rows[-1][MATRIX_SIDES.index(side)], weights * bytes_per_weight(grid) / read_gb_per_s / 1e9)
                )
            else:
                if (side, count) not in known:
                    known[side, count] = _seconds(grid, side, count, threads, pace)
                row.append(known[side, count])
        rows.append(row[::-1])
    return rows


def _seconds(grid: QuantizationScheme | None, side: int, count: int, threads: int, pace: ContentionProbe) -> float:
    """Seconds of one product in a chain of `count`, without what a call takes that computes nothing to speak of."""
    return (_run_s(_chain(grid, side, count), side, threads, pace) - _call_s(threads, pace)) / count


@cache
def _call_s(threads: int, pace: ContentionProbe) -> float:
    return _run_s(_chain(None, LEAST_SIDE, 1), LEAST_SIDE, threads, pace)


def _run_s(graph: bytes, side: int, threads: int, pace: ContentionProbe) -> float:
    """Seconds of one run, the median of some at a usual pace."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {"x0": np.ones((1, 1, side), np.float32)}
    for _ in range(LEAST_RUNS):
        session.run(None, feed)
    taken, paces = list[float](), list[float]()
    began_s = time.perf_counter()
    while True:
        before, end = pace.now(), time.perf_counter() + STRETCH_S
        times: list[float] = []
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        taken += times
        paces += [max(before, pace.now())] * len(times)
        counted = select_undisturbed(taken, paces, pace.best_s)
        if len(counted) >= LEAST_RUNS and sum(counted) >= TIMED_S:
            return median(counted)
        if time.perf_counter() - began_s > PATIENCE * (TIMED_S + LEAST_RUNS * min(taken)):
            return median(counted or taken)


def _chain(grid: QuantizationScheme | None, side: int, count: int) -> bytes:
    """A graph of `count` products, each of the last one's result.

    Weights are random, as equal ones might be stored once, and such that results keep their size.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []
    for number in range(count):
        tensors = _tensors(grid, side, chance)
        names = [f"{name}{number}" for name in tensors]
        weights += [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors.values(), names, strict=True)]
        nodes += _nodes(grid, side, names, number)
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, 1, side])],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, [1, 1, side])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return serialized


def _tensors(grid: QuantizationScheme | None, side: int, chance: np.random.Generator) -> dict[str, np.ndarray]:
    """A matrix of `side` rows and columns, and where inputs have a fixed range, that range."""
    import numpy as np

    if grid is None:
        return {"weights": chance.standard_normal((side, side), np.float32) / np.float32(side**0.5)}
    size = np.float32(12**0.5 / 2**grid.bits / side**0.5)  # of uniform codes, whose variance is 4**bits / 12
    signed = np.array([-size, size])  # codes have a mean, and would make one of their own products grow
    if grid.inputs == "float":
        block = min(grid.block_size, side)
        blocks = side // block
        return {
            "codes": chance.integers(0, 256, (side, blocks, block * grid.bits // 8), np.uint8),
            "scales": chance.choice(signed, (side, blocks)),
        }
    integers: dict[str, np.ndarray] = {
        "codes": chance.integers(0, 256, (side, side), np.uint8),
        "scales": chance.choice(signed, side),
        "zero_points": np.full(side, 128, np.uint8),
    }
    fixed: dict[str, np.ndarray] = {"scale": np.array(1 / 32, np.float32), "zero_point": np.array(128, np.uint8)}
    return integers if grid.inputs == "dynamic" else integers | fixed


def _nodes(grid: QuantizationScheme | None, side: int, weights: list[str], number: int) -> list[Any]:
    from onnx import helper

    here, there = f"x{number}", f"x{number + 1}"
    if grid is None:
        return [helper.make_node("MatMul", [here, *weights], [there])]
    if grid.inputs == "float":
        block = min(grid.block_size, side)
        sizes = {"K": side, "N": side, "bits": grid.bits, "block_size": block, "accuracy_level": 4}
        return [helper.make_node("MatMulNBits", [here, *weights], [there], domain="com.microsoft", **sizes)]
    if grid.inputs == "dynamic":
        return [helper.make_node("DynamicQuantizeMatMul", [here, *weights], [there], domain="com.microsoft")]
    codes, scales, zero_points, scale, zero_point = weights
    taken = f"codes of {here}"
    inputs = [taken, codes, scale, scales, zero_point, zero_points]
    return [
        helper.make_node("QuantizeLinear", [here, scale, zero_point], [taken]),
        helper.make_node("MatMulIntegerToFloat", inputs, [there], domain="com.microsoft"),
    ]
