"""What an engine was built of and by, kept beside it, and what may load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeopt.core.artifact import sha256_of
from edgeopt.errors import BuildError
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.gpu import Identity
from edgeopt.runtimes.tensorrt.plan import ENGINE, Plan

FILE = "engine.json"
_AMPERE = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltBy:
    """The identity of a serialized engine.

    Attributes:
        graph_sha256: of the ONNX file that it was built from.
        engine_sha256, engine_bytes: of the serialized engine.
        tensorrt: version that built it.
        hardware, version_compatible: as the runtime was told (see edgeopt.runtimes.tensorrt.runtime.TensorRt).
    """

    graph_sha256: str
    engine_sha256: str
    engine_bytes: int
    tensorrt: str
    gpu: Identity
    hardware: str
    version_compatible: bool

    @classmethod
    def of(cls, plan: Plan, directory: Path, *, tensorrt: str, gpu: Identity) -> BuiltBy:
        return cls(
            graph_sha256=plan.graph_sha256,
            engine_sha256=sha256_of(directory / ENGINE),
            engine_bytes=(directory / ENGINE).stat().st_size,
            tensorrt=tensorrt,
            gpu=gpu,
            hardware=plan.runtime.hardware,
            version_compatible=plan.runtime.version_compatible,
        )

    @classmethod
    def read(cls, directory: Path) -> BuiltBy:
        """BuildError where the folder holds a plan alone, or an identity that cannot be read."""
        path = directory / FILE
        if not path.is_file():
            raise BuildError(
                "this is the plan of a TensorRT engine",
                location=str(directory),
                hint=f"Build it on its device: edgeopt build-plan {directory}",
            )
        try:
            document = json.loads(path.read_text())
            return cls(**document | {"gpu": Identity(**document["gpu"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BuildError(
                f"the engine's identity cannot be read ({error})", location=str(path), hint=_AGAIN
            ) from error

    def write(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def require(self, directory: Path, *, tensorrt: str, gpu: Identity) -> None:
        """BuildError with all reasons for which the engine in `directory` cannot be loaded here, a sentence each."""
        if faults := [*self._files(directory), *self._versions(tensorrt), *self._hardware(gpu)]:
            raise BuildError("; ".join(faults), location=str(directory), hint=_AGAIN)

    def _files(self, directory: Path) -> Iterator[str]:
        path = directory / ENGINE
        size = path.stat().st_size if path.is_file() else 0
        if size != self.engine_bytes:
            yield f"{ENGINE} has {size} bytes of the {self.engine_bytes} that were built: it was cut off"
        elif sha256_of(path) != self.engine_sha256:
            yield f"{ENGINE} was changed after it was built: its sha256 differs"
        if plans.read(directory).graph_sha256 != self.graph_sha256:
            yield "it was built from another graph than the one that is planned beside it"

    def _versions(self, tensorrt: str) -> Iterator[str]:
        built, here = _numbers(self.tensorrt), _numbers(tensorrt)
        fits = here[0] == built[0] and here >= built if self.version_compatible else here == built
        if not fits:
            later = " or later" if self.version_compatible else ""
            yield f"it was built by TensorRT {self.tensorrt} and loads with that{later}, and here is {tensorrt}"

    def _hardware(self, gpu: Identity) -> Iterator[str]:
        built = self.gpu
        if self.hardware == "this" and gpu.name != built.name:
            yield f"it was built for {built.name}, and here is {gpu.name}"
        if self.hardware == "ampere_plus":
            if float(gpu.compute_capability) < _AMPERE:
                yield f"it runs from compute capability {_AMPERE} on, and {gpu.name} has {gpu.compute_capability}"
        elif gpu.compute_capability != built.compute_capability:
            yield f"it was built for compute capability {built.compute_capability}, not {gpu.compute_capability}"


_AGAIN = "Build the plan again on this device: edgeopt build-plan"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
