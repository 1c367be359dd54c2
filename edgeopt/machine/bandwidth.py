"""Measure the throughput limits of this machine: memory and storage reads, and matrix multiplication.

Memory reads and matrix multiplication use every core that this process may use. Decoding reads each weight once per
token, so weight bytes / read bandwidth is a lower bound on the time per token. For weights that exceed the memory, the
storage bandwidth gives the bound. Prefill is bounded by the matrix throughput.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

_BUFFER_BYTES = 2**28  # several times the last-level cache of an edge device
_FILE_BYTES, _BLOCK_BYTES = 2**28, 2**23
_MATRIX_SIDE = 1024
_REPEATS = 5


def measure_read_gb_per_s() -> float:
    """Return the memory read bandwidth in 1e9 bytes per second.

    Each core computes the maximum of its own slice of a buffer. NumPy vectorizes this operation, releases the GIL and
    starts no threads of its own.
    """
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    slices = np.array_split(np.ones(_BUFFER_BYTES // 4, dtype=np.int32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return _BUFFER_BYTES / _median_s(lambda: list(pool.map(np.max, slices))) / 1e9


def measure_storage_gb_per_s(folder: Path) -> float:
    """Return the sequential read bandwidth of the storage under `folder`, in 1e9 bytes per second.

    A temporary file of 256 MiB is read with O_DIRECT, which bypasses the page cache. Return 0 if the file system does
    not support O_DIRECT (tmpfs), or if the file cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            block = os.urandom(_BLOCK_BYTES)
            for _ in range(_FILE_BYTES // _BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return measure_direct_read_bytes_per_s(Path(file.name)) / 1e9
    except OSError:
        return 0.0


def measure_direct_read_bytes_per_s(path: Path) -> float:
    """Read a file with O_DIRECT and return the read bandwidth in bytes per second.

    Raises OSError if the file system does not support O_DIRECT.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        # O_DIRECT requires an aligned buffer; mmap returns whole pages
        buffer, read_bytes, start_s = mmap.mmap(-1, _BLOCK_BYTES), 0, time.perf_counter()
        while count := os.preadv(descriptor, [buffer], read_bytes):
            read_bytes += count
            if count < _BLOCK_BYTES:
                break
        return read_bytes / (time.perf_counter() - start_s)
    finally:
        os.close(descriptor)


def measure_fp32_gflops() -> float:
    """Return 1e9 floating-point operations per second of ONNX Runtime's MatMul, 1024 x 1024 x 1024."""
    return _measure_matmul_gops("MatMul", "float32")


def measure_int8_gops() -> float:
    """Return 1e9 integer operations per second of ONNX Runtime's MatMulInteger, 1024 x 1024 x 1024, uint8 by int8."""
    return _measure_matmul_gops("MatMulInteger", "int8")


def _measure_matmul_gops(operator: str, weight_type: str) -> float:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    integer = weight_type == "int8"
    weight = np.ones((_MATRIX_SIDE, _MATRIX_SIDE), dtype=weight_type)
    element_types = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "matmul",
        [helper.make_tensor_value_info("a", element_types[0], [_MATRIX_SIDE, _MATRIX_SIDE])],
        [helper.make_tensor_value_info("c", element_types[1], [_MATRIX_SIDE, _MATRIX_SIDE])],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"a": np.ones((_MATRIX_SIDE, _MATRIX_SIDE), dtype=np.uint8 if integer else np.float32)}
    return 2 * _MATRIX_SIDE**3 / _median_s(lambda: session.run(None, feed)) / 1e9


def _median_s(work: Callable[[], Any]) -> float:
    """Return the median duration of `work` in seconds, after one warm-up call."""
    work()
    durations_s = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        work()
        durations_s.append(time.perf_counter() - start_s)
    return median(durations_s)
