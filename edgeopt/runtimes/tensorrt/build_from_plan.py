"""A plan that was made elsewhere becomes an engine on this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.core.artifact import Engine, link_file
from edgeopt.runtimes.tensorrt import builder, gpu, identity, library
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.runtime import TensorRt

if TYPE_CHECKING:
    from edgeopt.core.protocols import Progress


def finish(planned: Engine, directory: Path, progress: Progress) -> Engine:
    """The engine of a plan in the new or empty `directory`, with the plan's files beside it.

    Raises BuildError where there is no GPU or no TensorRT, or where the plan does not pass its checks.
    """
    planned.require_format(TensorRt.format)
    plan = plans.read(planned.directory)
    device, trt = gpu.Cuda(), library.load()
    plan.check()
    directory.mkdir(parents=True, exist_ok=True)
    for record in planned.files:
        if record.path not in (plans.ENGINE, identity.FILE):
            (directory / record.path).parent.mkdir(parents=True, exist_ok=True)
            link_file(planned.directory / record.path, directory / record.path)
    builder.build(plan, directory, trt=trt, gpu=device, progress=progress)
    return Engine.seal(directory, format=planned.format, spec=planned.spec, made_by=planned.made_by)
