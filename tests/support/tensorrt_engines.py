"""Build and open TensorRT engines with the fake library of `support.fake_tensorrt` and a fake GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from edgeopt.core.artifact import Engine
from edgeopt.runtimes.tensorrt import builder
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.engine_identity import EngineIdentity
from edgeopt.runtimes.tensorrt.gpu import GpuIdentity
from edgeopt.runtimes.tensorrt.runtime import TensorRt
from edgeopt.runtimes.tensorrt.session import TensorRtSession
from support import fake_tensorrt

DEFAULT_RUNTIME = TensorRt()
H200 = GpuIdentity(name="NVIDIA H200", compute_capability="9.0", cuda="13.0")


class FakeGpu:
    """A GPU whose memory is host memory and whose kernels run at once."""

    def __init__(self, identity: GpuIdentity = H200) -> None:
        self.identity, self.device, self.stream = identity, torch.device("cpu"), 1
        self.captured_graphs = 0

    def synchronize(self) -> None:
        pass

    def capture_graph(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.captured_graphs += 1
        return launch


def build_engine(planned: Engine, directory: Path, runtime: TensorRt = DEFAULT_RUNTIME) -> Engine:
    """Build the engine of a plan with the fake TensorRT, under the settings of `runtime`."""
    shutil.copytree(planned.directory, directory)
    plan = replace(plans.read(directory), runtime=runtime)
    plan.write(directory)
    builder.build(plan, directory, trt=fake_tensorrt, gpu=FakeGpu(), progress=lambda _: None)
    return Engine.seal(directory, format=planned.format, spec=planned.spec, made_by=planned.made_by)


def open_engine(engine: Engine, gpu: FakeGpu | None = None, runtime: TensorRt = DEFAULT_RUNTIME) -> TensorRtSession:
    identity = EngineIdentity.read(engine.directory)
    return TensorRtSession(engine, runtime, identity, trt=fake_tensorrt, gpu=gpu or FakeGpu())
