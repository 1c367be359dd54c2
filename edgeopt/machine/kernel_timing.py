"""Time ONNX Runtime's CPU kernels for vector-matrix products, which take most of the decoding time.

Each measurement runs a chain of matrices of one size, because in a model each product also waits for the one before
it. One run of a chain reads all its weights once. A long chain therefore reads its weights from memory and a short one
from a cache.
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

TIMED_S, PROBE_INTERVAL_S = 0.05, 0.02
"""A measurement needs undisturbed runs of `TIMED_S` in total, and probes contention every `PROBE_INTERVAL_S`."""
MIN_RUNS = 5
"""Smallest number of undisturbed runs of a measurement, and number of warm-up runs."""
TIMEOUT_FACTOR = 8
"""A measurement stops after this multiple of its undisturbed duration, even if few runs were undisturbed."""
PASSES = 3
"""Each chain is timed this many times, and the median counts. It excludes one pass that was disturbed, or that had an
unusually large part of a cache shared with other virtual machines."""
MIN_PRODUCTS, MAX_PRODUCTS = 4, 1024
"""Products in a chain. With fewer, the overhead of a run dominates; with more, ONNX Runtime takes too long to create
the session."""
OVERHEAD_SIDE = 8
"""Side of a matrix that is so small that a run measures the overhead of the call."""
MEMORY_FACTOR = 8
"""Memory needed for a session, as a multiple of the chain's size: ONNX Runtime holds the weights as a serialized model,
as tensors and prepacked."""


def time_matrix_kernels(
    schemes: Iterable[QuantizationScheme | None],
    *,
    threads: int,
    ram_bytes: int,
    read_gb_per_s: float,
    probe: ContentionProbe,
    progress: Progress,
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Return the microseconds of a product by matrix kind, in the layout of edgeopt.core.kernel_times.KernelTimes.

    Two kinds of entries are extrapolated from the next smaller working set. If a chain would exceed `MAX_PRODUCTS`, the
    slowdown per weight of the largest matrices is added. If the machine has too little memory for a chain, the time is
    at least that of reading the weights at `read_gb_per_s`.

    Args:
        schemes: quantization schemes to time; None stands for fp32.
        threads: compute threads of ONNX Runtime.
        ram_bytes: memory of the machine.
        read_gb_per_s: memory read bandwidth in 1e9 bytes per second.
    """
    import numpy as np

    passes_by_kind: dict[str, list[np.ndarray]] = {}
    for _ in range(PASSES):
        for scheme in schemes:
            progress(f"timing {matrix_kind(scheme)} matrices")
            seconds = _time_scheme(scheme, threads, ram_bytes, read_gb_per_s, probe)
            passes_by_kind.setdefault(matrix_kind(scheme), []).append(np.array(seconds))
    times = {}
    for name, passes in passes_by_kind.items():
        monotonic = np.maximum.accumulate(np.maximum.accumulate(np.median(passes, axis=0), axis=0), axis=1)
        times[name] = tuple(tuple(round(1e6 * float(s), 3) for s in row) for row in monotonic)
    return times


def _time_scheme(
    scheme: QuantizationScheme | None, threads: int, ram_bytes: int, read_gb_per_s: float, probe: ContentionProbe
) -> list[list[float]]:
    """Return the seconds of a product, shape (len(WORKING_SET_BYTES), len(MATRIX_SIDES))."""
    measured: dict[tuple[int, int], float] = {}
    rows: list[list[float]] = []
    for size_bytes in WORKING_SET_BYTES:
        row: list[float] = []
        for side in reversed(MATRIX_SIDES):
            weights = side**2
            count = max(MIN_PRODUCTS, round(size_bytes / bytes_per_weight(scheme) / weights))
            if count > MAX_PRODUCTS:
                slowdown_per_weight_s = (row[0] - rows[-1][-1]) / MATRIX_SIDES[-1] ** 2
                row.append(rows[-1][MATRIX_SIDES.index(side)] + max(0.0, slowdown_per_weight_s) * weights)
            elif rows and size_bytes * MEMORY_FACTOR > ram_bytes:
                row.append(
                    max(rows[-1][MATRIX_SIDES.index(side)], weights * bytes_per_weight(scheme) / read_gb_per_s / 1e9)
                )
            else:
                if (side, count) not in measured:
                    measured[side, count] = _time_product(scheme, side, count, threads, probe)
                row.append(measured[side, count])
        rows.append(row[::-1])
    return rows


def _time_product(
    scheme: QuantizationScheme | None, side: int, count: int, threads: int, probe: ContentionProbe
) -> float:
    """Return the seconds of one product in a chain of `count` products, without the overhead of a run."""
    run_s = _time_run(_build_chain(scheme, side, count), side, threads, probe)
    return (run_s - _time_overhead(threads, probe)) / count


@cache
def _time_overhead(threads: int, probe: ContentionProbe) -> float:
    return _time_run(_build_chain(None, OVERHEAD_SIDE, 1), OVERHEAD_SIDE, threads, probe)


def _time_run(graph: bytes, side: int, threads: int, probe: ContentionProbe) -> float:
    """Return the median seconds of the undisturbed runs of a chain, or of all runs if none was undisturbed."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {"x0": np.ones((1, 1, side), np.float32)}
    for _ in range(MIN_RUNS):
        session.run(None, feed)
    durations_s, probe_times_s = list[float](), list[float]()
    began_s = time.perf_counter()
    while True:
        before_s, end_s = probe.measure_s(), time.perf_counter() + PROBE_INTERVAL_S
        batch_s: list[float] = []
        while not batch_s or time.perf_counter() < end_s:
            start_s = time.perf_counter()
            session.run(None, feed)
            batch_s.append(time.perf_counter() - start_s)
        durations_s += batch_s
        probe_times_s += [max(before_s, probe.measure_s())] * len(batch_s)
        undisturbed_s = select_undisturbed(durations_s, probe_times_s, probe.best_s)
        if len(undisturbed_s) >= MIN_RUNS and sum(undisturbed_s) >= TIMED_S:
            return median(undisturbed_s)
        if time.perf_counter() - began_s > TIMEOUT_FACTOR * (TIMED_S + MIN_RUNS * min(durations_s)):
            return median(undisturbed_s or durations_s)


def _build_chain(scheme: QuantizationScheme | None, side: int, count: int) -> bytes:
    """Return a serialized graph of `count` products, each of which multiplies the result of the previous one.

    The weights are random, because ONNX Runtime might store equal weights once. They are scaled so that the magnitude
    of the results stays constant along the chain.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []
    for index in range(count):
        tensors = _create_tensors(scheme, side, rng)
        names = [f"{name}{index}" for name in tensors]
        weights += [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors.values(), names, strict=True)]
        nodes += _create_nodes(scheme, side, names, index)
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


def _create_tensors(scheme: QuantizationScheme | None, side: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the tensors of a matrix, shape (side, side); with static inputs also the input scale and zero point."""
    import numpy as np

    if scheme is None:
        return {"weights": rng.standard_normal((side, side), np.float32) / np.float32(side**0.5)}
    scale = np.float32(12**0.5 / 2**scheme.bits / side**0.5)  # uniform codes have a variance of 4**bits / 12
    # the mean of the codes is not zero: with scales of one sign, products would amplify it along the chain
    signed_scales = np.array([-scale, scale])
    if scheme.inputs == "float":
        block_size = min(scheme.block_size, side)
        blocks = side // block_size
        return {
            "codes": rng.integers(0, 256, (side, blocks, block_size * scheme.bits // 8), np.uint8),
            "scales": rng.choice(signed_scales, (side, blocks)),
        }
    weights: dict[str, np.ndarray] = {
        "codes": rng.integers(0, 256, (side, side), np.uint8),
        "scales": rng.choice(signed_scales, side),
        "zero_points": np.full(side, 128, np.uint8),
    }
    inputs: dict[str, np.ndarray] = {"scale": np.array(1 / 32, np.float32), "zero_point": np.array(128, np.uint8)}
    return weights if scheme.inputs == "dynamic" else weights | inputs


def _create_nodes(scheme: QuantizationScheme | None, side: int, weights: list[str], index: int) -> list[Any]:
    """Return the nodes of product `index`: the kernels that ONNX Runtime uses for this scheme."""
    from onnx import helper

    x, y = f"x{index}", f"x{index + 1}"
    if scheme is None:
        return [helper.make_node("MatMul", [x, *weights], [y])]
    if scheme.inputs == "float":
        block_size = min(scheme.block_size, side)
        sizes = {"K": side, "N": side, "bits": scheme.bits, "block_size": block_size, "accuracy_level": 4}
        return [helper.make_node("MatMulNBits", [x, *weights], [y], domain="com.microsoft", **sizes)]
    if scheme.inputs == "dynamic":
        return [helper.make_node("DynamicQuantizeMatMul", [x, *weights], [y], domain="com.microsoft")]
    codes, scales, zero_points, scale, zero_point = weights
    quantized = f"codes of {x}"
    inputs = [quantized, codes, scale, scales, zero_point, zero_points]
    return [
        helper.make_node("QuantizeLinear", [x, scale, zero_point], [quantized]),
        helper.make_node("MatMulIntegerToFloat", inputs, [y], domain="com.microsoft"),
    ]
