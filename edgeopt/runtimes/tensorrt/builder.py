"""An engine from its plan, by TensorRT on the GPU that is to run it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.errors import BuildError
from edgeopt.runtimes.tensorrt import library
from edgeopt.runtimes.tensorrt.identity import BuiltBy
from edgeopt.runtimes.tensorrt.plan import ENGINE

if TYPE_CHECKING:
    from edgeopt.core.protocols import Progress
    from edgeopt.runtimes.tensorrt.gpu import Gpu
    from edgeopt.runtimes.tensorrt.library import Trt
    from edgeopt.runtimes.tensorrt.plan import Plan


def build(plan: Plan, directory: Path, *, trt: Trt, gpu: Gpu, progress: Progress) -> None:
    """Write the serialized engine of `plan` and its identity into `directory`. Raises BuildError."""
    told: list[str] = []
    builder = trt.Builder(library.logger(trt, told))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, plan, told)
    config = _config(trt, builder, plan)
    times = _times(str(trt.__version__), gpu.identity.name)
    cache = config.create_timing_cache(times.read_bytes() if times.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    progress(f"TensorRT {trt.__version__} builds for {gpu.identity.name}, which takes minutes")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"TensorRT could not build the engine: {_last(told)}", location=str(plan.graph))
    (directory / ENGINE).write_bytes(serialized)
    _keep(times, config.get_timing_cache())
    BuiltBy.of(plan, directory, tensorrt=str(trt.__version__), gpu=gpu.identity).write(directory)


def _parse(trt: Trt, network: Any, plan: Plan, told: list[str]) -> None:
    parser = trt.OnnxParser(network, library.logger(trt, told))
    if not parser.parse_from_file(str(plan.graph)):
        found = [str(parser.get_error(number).desc()) for number in range(parser.num_errors)]
        raise BuildError(f"TensorRT does not take the graph: {'; '.join(found)}", location=str(plan.graph))


def _config(trt: Trt, builder: Any, plan: Plan) -> Any:
    config, runtime = builder.create_builder_config(), plan.runtime
    config.builder_optimization_level = runtime.optimization_level
    if runtime.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, runtime.workspace_mib * 2**20)
    flags = {
        trt.BuilderFlag.REFIT: runtime.refit,
        trt.BuilderFlag.VERSION_COMPATIBLE: runtime.version_compatible,
        trt.BuilderFlag.WEIGHT_STREAMING: bool(runtime.weights_mib),
    }
    for flag in (flag for flag, wanted in flags.items() if wanted):
        config.set_flag(flag)
    if runtime.hardware != "this":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, runtime.hardware.upper())
    for ranges in plan.profiles.values():
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in ranges.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    return config


def _times(version: str, gpu: str) -> Path:
    """Where times of kernels are kept, which make the next engine for the same GPU be built sooner."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeopt" / "tensorrt"
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{version}.times"


def _keep(path: Path, cache: Any) -> None:
    """Whole at any moment, as another process may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_bytes(cache.serialize())
    new.replace(path)


def _last(told: list[str]) -> str:
    return told[-1] if told else "it does not say why"
