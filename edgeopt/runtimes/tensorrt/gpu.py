"""The GPU that engines run on, by torch: its identity, its memory, and graphs of its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What decides whether an engine runs on a GPU.

    Attributes:
        compute_capability: as NVIDIA writes it, such as 9.0.
        cuda: version of the toolkit that the process computes with.
    """

    name: str
    compute_capability: str
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, CUDA {self.cuda})"


class Gpu(Protocol):
    """Where buffers lie and work is queued."""

    identity: Identity
    location: torch.device
    stream: int
    """The handle of the CUDA stream on which all work is queued."""

    def wait(self) -> None:
        """Until all that was queued or copied is done."""
        ...

    def captured(self, queue: Callable[[], None]) -> Callable[[], None]:
        """What queues the same kernels again at once; `queue` must have run before."""
        ...


@cache
def first() -> Identity | None:
    """The GPU that a process computes on where it is told nothing else; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Identity(
        name=torch.cuda.get_device_name(0), compute_capability=f"{major}.{minor}", cuda=str(torch.version.cuda)
    )


class Cuda:
    """The first GPU, with a stream of its own."""

    def __init__(self) -> None:
        import torch

        from edgeopt.errors import BuildError

        found = first()
        if found is None:
            raise BuildError("there is no NVIDIA GPU here", hint="Open the engine on its device")
        self.identity, self.location = found, torch.device("cuda")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream: int = self._stream.cuda_stream

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def captured(self, queue: Callable[[], None]) -> Callable[[], None]:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            queue()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay
