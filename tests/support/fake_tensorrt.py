"""A TensorRT that computes on the CPU by ONNX Runtime, with those names of the real one that edgeopt uses.

It holds engines to what the real one holds them to: shapes within the profile of a context, addresses for all inputs
and outputs, and nothing written over that is still to be read.
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
built: list[dict[str, Any]] = []
"""What each engine was built with."""


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


_TYPES = {
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
    def __init__(self, known: bytes) -> None:
        self._known = known

    def serialize(self) -> bytes:
        return self._known + b"."


class IOptimizationProfile:
    def __init__(self) -> None:
        self._ranges: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        self._ranges[name] = [list(least), list(usual), list(most)]


class IBuilderConfig:
    builder_optimization_level = 3
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def __init__(self) -> None:
        self._flags: list[str] = []
        self._pools: dict[str, int] = {}
        self._profiles: list[dict[str, list[list[int]]]] = []

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.append(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._pools[pool.name] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile._ranges)
        return len(self._profiles) - 1

    def create_timing_cache(self, known: bytes) -> ITimingCache:
        return ITimingCache(known)

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

    def get_error(self, number: int) -> ParserError:
        return self._errors[number]


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
        if config._pools.get("WORKSPACE") == 2**20:
            self._logger.log(ILogger.ERROR, "no kernel runs in so little workspace")
            return None
        made = {
            "graph": network._path,
            "profiles": config._profiles,
            "flags": config._flags,
            "pools": config._pools,
            "hardware": config.hardware_compatibility_level.name,
            "level": config.builder_optimization_level,
        }
        built.append(made)
        return json.dumps(made).encode()


class ICudaEngine:
    streamable_weights_size = 2**30
    weight_streaming_budget_v2 = 0

    def __init__(self, made: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        # its optimizer of casts crashes on graphs that mix fp16 and fp32 (1.32)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(made["graph"], options, providers=["CPUExecutionProvider"])
        self._profiles = made["profiles"]
        self._values = {value.name: value for value in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, number: int) -> str:
        return list(self._values)[number]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self._values[name].type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self._values[name].shape)

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self._ranges = self._engine._profiles[number]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        for name, (least, _, most) in self._ranges.items():
            sides = zip(least, self._shapes[name], most, strict=True)
            if not all(low <= side <= high for low, side, high in sides):
                return False
        inputs = {value.name: value for value in self._engine._session.get_inputs()}
        outputs = [value.name for value in self._engine._session.get_outputs()]
        assert not {self._addresses[n] for n in inputs} & {self._addresses[n] for n in outputs}
        given = {
            name: _at(self._addresses[name], self._shapes[name], _TYPES[value.type][1]).copy()
            for name, value in inputs.items()
        }
        for name, found in zip(outputs, self._engine._session.run(outputs, given), strict=True):
            _at(self._addresses[name], found.shape, found.dtype)[...] = found
        return True


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, reader: Any) -> ICudaEngine | None:
        reader.seek(0, SeekPosition.SET)
        whole = b"".join(iter(lambda: reader.read(100, 0), b""))
        made = json.loads(whole)
        if not Path(made["graph"]).is_file():
            self._logger.log(ILogger.ERROR, "the engine is of another machine")
            return None
        return ICudaEngine(made)


def _at(address: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
    held = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(held, kind).reshape(shape)
