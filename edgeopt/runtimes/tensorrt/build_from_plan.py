"""Build a TensorRT engine on this machine's GPU from a plan that another machine wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.core.artifact import Engine, link_file
from edgeopt.runtimes.tensorrt import builder, engine_identity, gpu, library
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.runtime import TensorRt

if TYPE_CHECKING:
    from edgeopt.core.protocols import Progress


def build_from_plan(planned: Engine, directory: Path, progress: Progress) -> Engine:
    """Build the engine of the plan in `planned` into the new or empty `directory`.

    The plan's files are linked into `directory`, so that the engine can be built again from there.

    Raises:
        BuildError: if this machine has no NVIDIA GPU or no TensorRT, or if the plan fails its checks.
    """
    planned.require_format(TensorRt.format)
    plan = plans.read(planned.directory)
    device, trt = gpu.CudaGpu(), library.load()
    plan.check()
    directory.mkdir(parents=True, exist_ok=True)
    for record in planned.files:
        if record.path not in (plans.ENGINE_FILE, engine_identity.IDENTITY_FILE):
            (directory / record.path).parent.mkdir(parents=True, exist_ok=True)
            link_file(planned.directory / record.path, directory / record.path)
    builder.build(plan, directory, trt=trt, gpu=device, progress=progress)
    return Engine.seal(directory, format=planned.format, spec=planned.spec, made_by=planned.made_by)
