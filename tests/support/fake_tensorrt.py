"""Imitate the part of TensorRT's Python API that edgeopt uses, computing on the CPU with ONNX Runtime.

The fake enforces the rules of the real library: shapes must lie within the context's profile, all inputs and outputs
need addresses, and no output may share memory with an input.
"""

from __future__ import annotations

import ctypes
import json
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

__version__ = "11.4.0.106"
build_log: list[dict[str, Any]] = []
"""Settings of every engine that was built, oldest first."""
TOO_SMALL_WORKSPACE_BYTES = 2**20
"""A workspace limit at which the build fails."""


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 0


class BuilderFlag(IntEnum):
    REFIT = 0
    VERSION_COMPATIBLE = 1
    WEIGHT_STREAMING = 2


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class SeekPosition(IntEnum):
    SET = 0
    CUR = 1
    END = 2


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    INT32 = 3


_DTYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class IStreamReaderV2:
    pass


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        """Return the content with one more byte, so that a test can count the builds that used this cache."""
        return self._content + b"."


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shape_ranges: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, min: Any, opt: Any, max: Any) -> None:
        self._shape_ranges[name] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    builder_optimization_level = 3
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def __init__(self) -> None:
        self._flags: list[str] = []
        self._pool_limits: dict[str, int] = {}
        self._profiles: list[dict[str, list[list[int]]]] = []

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.append(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._pool_limits[pool.name] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile._shape_ranges)
        return len(self._profiles) - 1

    def create_timing_cache(self, content: bytes) -> ITimingCache:
        return ITimingCache(content)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class INetworkDefinition:
    _path = ""


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()

    def parse_from_file(self, path: str) -> bool:
        nodes = onnx.load(path, load_external_data=False).graph.node
        self._errors = [ParserError(f"no importer for {n.op_type}") for n in nodes if n.op_type == "NonZero"]
        self._network._path = path
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        """Return the settings as JSON, in place of a serialized engine."""
        if config._pool_limits.get("WORKSPACE") == TOO_SMALL_WORKSPACE_BYTES:
            self._logger.log(ILogger.ERROR, "no kernel fits the workspace limit")
            return None
        settings = {
            "graph": network._path,
            "profiles": config._profiles,
            "flags": config._flags,
            "pool_limits": config._pool_limits,
            "hardware": config.hardware_compatibility_level.name,
            "level": config.builder_optimization_level,
        }
        build_log.append(settings)
        return json.dumps(settings).encode()


class ICudaEngine:
    streamable_weights_size = 2**30
    weight_streaming_budget_v2 = 0

    def __init__(self, settings: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        # ONNX Runtime 1.32 crashes when it optimizes the casts of graphs that mix fp16 and fp32
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(settings["graph"], options, providers=["CPUExecutionProvider"])
        self._profiles = settings["profiles"]
        self._values = {value.name: value for value in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _DTYPES[self._values[name].type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._values[name].shape)

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._shape_ranges = self._engine._profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        for name, (min_shape, _, max_shape) in self._shape_ranges.items():
            dims = zip(min_shape, self._shapes[name], max_shape, strict=True)
            if not all(low <= dim <= high for low, dim, high in dims):
                return False
        inputs = {value.name: value for value in self._engine._session.get_inputs()}
        outputs = [value.name for value in self._engine._session.get_outputs()]
        assert not {self._addresses[n] for n in inputs} & {self._addresses[n] for n in outputs}
        feeds = {
            name: _array_at(self._addresses[name], self._shapes[name], _DTYPES[value.type][1]).copy()
            for name, value in inputs.items()
        }
        for name, array in zip(outputs, self._engine._session.run(outputs, feeds), strict=True):
            _array_at(self._addresses[name], array.shape, array.dtype)[...] = array
        return True


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, reader: Any) -> ICudaEngine | None:
        reader.seek(0, SeekPosition.SET)
        settings = json.loads(b"".join(iter(lambda: reader.read(100, 0), b"")))
        if not Path(settings["graph"]).is_file():
            self._logger.log(ILogger.ERROR, "the engine belongs to another machine")
            return None
        return ICudaEngine(settings)


def _array_at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)
