"""Build a serialized TensorRT engine from a plan, on the GPU that runs it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.errors import BuildError
from edgeopt.runtimes.tensorrt import library
from edgeopt.runtimes.tensorrt.engine_identity import EngineIdentity
from edgeopt.runtimes.tensorrt.plan import ENGINE_FILE

if TYPE_CHECKING:
    from edgeopt.core.protocols import Progress
    from edgeopt.runtimes.tensorrt.gpu import Gpu
    from edgeopt.runtimes.tensorrt.library import TensorRtModule
    from edgeopt.runtimes.tensorrt.plan import Plan


def build(plan: Plan, directory: Path, *, trt: TensorRtModule, gpu: Gpu, progress: Progress) -> None:
    """Write the serialized engine of `plan` and its identity into `directory`.

    Raises:
        BuildError: if TensorRT rejects the graph or cannot build the engine.
    """
    log_messages: list[str] = []
    builder = trt.Builder(library.make_logger(trt, log_messages))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse_graph(trt, network, plan, log_messages)
    config = _builder_config(trt, builder, plan)
    timing_cache_path = _timing_cache_path(str(trt.__version__), gpu.identity.name)
    timing_cache = config.create_timing_cache(timing_cache_path.read_bytes() if timing_cache_path.is_file() else b"")
    config.set_timing_cache(timing_cache, ignore_mismatch=False)
    progress(f"building with TensorRT {trt.__version__} for {gpu.identity.name}; this takes minutes")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = log_messages[-1] if log_messages else "TensorRT reported no reason"
        raise BuildError(f"TensorRT failed to build the engine: {reason}", location=str(plan.graph))
    (directory / ENGINE_FILE).write_bytes(serialized)
    _save_timing_cache(timing_cache_path, config.get_timing_cache())
    EngineIdentity.of_build(plan, directory, tensorrt=str(trt.__version__), gpu=gpu.identity).write(directory)


def _parse_graph(trt: TensorRtModule, network: Any, plan: Plan, log_messages: list[str]) -> None:
    parser = trt.OnnxParser(network, library.make_logger(trt, log_messages))
    if not parser.parse_from_file(str(plan.graph)):
        errors = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        raise BuildError(f"TensorRT rejected the graph: {'; '.join(errors)}", location=str(plan.graph))


def _builder_config(trt: TensorRtModule, builder: Any, plan: Plan) -> Any:
    config, runtime = builder.create_builder_config(), plan.runtime
    config.builder_optimization_level = runtime.optimization_level
    if runtime.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, runtime.workspace_mib * 2**20)
    flags = {
        trt.BuilderFlag.REFIT: runtime.refit,
        trt.BuilderFlag.VERSION_COMPATIBLE: runtime.version_compatible,
        trt.BuilderFlag.WEIGHT_STREAMING: bool(runtime.weights_mib),
    }
    for flag in (flag for flag, enabled in flags.items() if enabled):
        config.set_flag(flag)
    if runtime.hardware != "this":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, runtime.hardware.upper())
    for shape_ranges in plan.profiles.values():
        profile = builder.create_optimization_profile()
        for name, (min_shape, opt_shape, max_shape) in shape_ranges.items():
            profile.set_shape(name, min_shape, opt_shape, max_shape)
        config.add_optimization_profile(profile)
    return config


def _timing_cache_path(tensorrt_version: str, gpu_name: str) -> Path:
    """Return the file with kernel timings, which speed up the next build for the same GPU and TensorRT version."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeopt" / "tensorrt"
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu_name)}-{tensorrt_version}.times"


def _save_timing_cache(path: Path, timing_cache: Any) -> None:
    """Replace the file in one step, because another process may read it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(timing_cache.serialize())
    draft.replace(path)
