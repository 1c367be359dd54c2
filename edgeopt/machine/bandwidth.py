"""Ceilings of this machine, all allowed cores together: reading memory and storage, and multiplying matrices.

Decoding reads every weight once a token, so bytes of weights / read bandwidth bounds it from below, and for weights
that do not fit the memory the bandwidth of storage does; reading a prompt is bounded by the matrix rates.
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

_BUFFER_BYTES = 2**28  # several times the last-level cache of what edge devices and servers have
_STORED_BYTES, _BLOCK_BYTES = 2**28, 2**23
_SIDE = 1024
_REPEATS = 5


def measure_read_gb_per_s() -> float:
    """1e9 bytes per second at which all cores together take the maximum of a buffer, each over its own share.

    A maximum of integers is vectorised, leaves Python's lock alone and never starts threads of its own.
    """
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    shares = np.array_split(np.ones(_BUFFER_BYTES // 4, dtype=np.int32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return _BUFFER_BYTES / _seconds(lambda: list(pool.map(np.max, shares))) / 1e9


def measure_storage_gb_per_s(folder: Path) -> float:
    """1e9 bytes per second of the storage below `folder`, of a file that is read in order and past the page cache.

    0 where it has no such storage (tmpfs) or no room for 256 MiB.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            block = os.urandom(_BLOCK_BYTES)
            for _ in range(_STORED_BYTES // _BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return measure_direct_read_bytes_per_s(Path(file.name)) / 1e9
    except OSError:
        return 0.0


def measure_direct_read_bytes_per_s(path: Path) -> float:
    """Bytes per second at which storage gives a file. Raises OSError where the file system knows no such reading."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer, read, begun = mmap.mmap(-1, _BLOCK_BYTES), 0, time.perf_counter()
        while count := os.preadv(file, [buffer], read):
            read += count
            if count < _BLOCK_BYTES:
                break
        return read / (time.perf_counter() - begun)
    finally:
        os.close(file)


def measure_fp32_gflops() -> float:
    """1e9 floating-point operations per second of ONNX Runtime's MatMul, 1024 x 1024 x 1024."""
    return _matrix_rate("MatMul", "float32")


def measure_int8_gops() -> float:
    """1e9 integer operations per second of ONNX Runtime's MatMulInteger, uint8 by int8."""
    return _matrix_rate("MatMulInteger", "int8")


def _matrix_rate(operator: str, weight_type: str) -> float:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    integer = weight_type == "int8"
    weight = np.ones((_SIDE, _SIDE), dtype=weight_type)
    kinds = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "rate",
        [helper.make_tensor_value_info("a", kinds[0], [_SIDE, _SIDE])],
        [helper.make_tensor_value_info("c", kinds[1], [_SIDE, _SIDE])],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"a": np.ones((_SIDE, _SIDE), dtype=np.uint8 if integer else np.float32)}
    return 2 * _SIDE**3 / _seconds(lambda: session.run(None, feed)) / 1e9


def _seconds(work: Callable[[], Any]) -> float:
    """The median of some repetitions after one that warms up."""
    work()
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)
