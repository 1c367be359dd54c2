"""Access the GPU through PyTorch: its identity, a CUDA stream and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """Properties of a GPU that decide which engines it can run.

    Attributes:
        compute_capability: NVIDIA's number for the GPU architecture, such as `9.0`.
        cuda: version of the CUDA toolkit in use.
    """

    name: str
    compute_capability: str
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, CUDA {self.cuda})"


class Gpu(Protocol):
    """A device that holds buffers and executes kernels on one CUDA stream."""

    identity: GpuIdentity
    device: torch.device
    stream: int
    """Handle of the CUDA stream that receives all kernels."""

    def synchronize(self) -> None:
        """Wait until all queued kernels and copies are complete."""
        ...

    def capture_graph(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record the kernels that `launch` queues and return a function that replays them in a single launch.

        Call `launch` once before the capture: TensorRT updates its state at the first launch with new shapes.
        """
        ...


@cache
def detect() -> GpuIdentity | None:
    """Return the identity of the first CUDA device, or None if there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return GpuIdentity(
        name=torch.cuda.get_device_name(0), compute_capability=f"{major}.{minor}", cuda=str(torch.version.cuda)
    )


class CudaGpu:
    """The first CUDA device, with its own stream."""

    def __init__(self) -> None:
        import torch

        from edgeopt.errors import BuildError

        identity = detect()
        if identity is None:
            raise BuildError("this machine has no NVIDIA GPU", hint="Open or build the engine on its target device")
        self.identity, self.device = identity, torch.device("cuda")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream: int = self._stream.cuda_stream

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def capture_graph(self, launch: Callable[[], None]) -> Callable[[], None]:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            launch()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay
