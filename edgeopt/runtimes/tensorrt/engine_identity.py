"""Record what a serialized engine was built from and with, and check that this machine can load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeopt.core.artifact import sha256_of
from edgeopt.errors import BuildError
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.gpu import GpuIdentity
from edgeopt.runtimes.tensorrt.plan import ENGINE_FILE, Plan

IDENTITY_FILE = "engine.json"
_AMPERE = 8.0
_REBUILD_HINT = "Build the plan again on this device with `edgeopt build-plan`"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """The inputs and tools that produced a serialized engine.

    Attributes:
        graph_sha256: digest of the ONNX file that the engine was built from.
        engine_sha256: digest of the serialized engine.
        engine_bytes: size of the serialized engine.
        tensorrt: version of TensorRT that built the engine.
        hardware: as in `edgeopt.runtimes.tensorrt.runtime.TensorRt`.
        version_compatible: as in `edgeopt.runtimes.tensorrt.runtime.TensorRt`.
    """

    graph_sha256: str
    engine_sha256: str
    engine_bytes: int
    tensorrt: str
    gpu: GpuIdentity
    hardware: str
    version_compatible: bool

    @classmethod
    def of_build(cls, plan: Plan, directory: Path, *, tensorrt: str, gpu: GpuIdentity) -> EngineIdentity:
        """Return the identity of the engine in `directory`, just built from `plan`."""
        return cls(
            graph_sha256=plan.graph_sha256,
            engine_sha256=sha256_of(directory / ENGINE_FILE),
            engine_bytes=(directory / ENGINE_FILE).stat().st_size,
            tensorrt=tensorrt,
            gpu=gpu,
            hardware=plan.runtime.hardware,
            version_compatible=plan.runtime.version_compatible,
        )

    @classmethod
    def read(cls, directory: Path) -> EngineIdentity:
        """Read the identity of the engine in `directory`.

        Raises:
            BuildError: if the folder holds a plan without an engine, or if the identity is unreadable.
        """
        path = directory / IDENTITY_FILE
        if not path.is_file():
            raise BuildError(
                "the folder holds a TensorRT build plan, not an engine",
                location=str(directory),
                hint=f"Build the engine on its device with `edgeopt build-plan {directory}`",
            )
        try:
            document = json.loads(path.read_text())
            return cls(**document | {"gpu": GpuIdentity(**document["gpu"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BuildError(
                f"the engine's identity is unreadable ({error})", location=str(path), hint=_REBUILD_HINT
            ) from error

    def write(self, directory: Path) -> None:
        """Write the identity beside the engine in `directory`."""
        (directory / IDENTITY_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def require_loadable(self, directory: Path, *, tensorrt: str, gpu: GpuIdentity) -> None:
        """Raise BuildError with every reason why TensorRT `tensorrt` on `gpu` cannot load the engine in `directory`."""
        if faults := [*self._file_faults(directory), *self._version_faults(tensorrt), *self._gpu_faults(gpu)]:
            raise BuildError("; ".join(faults), location=str(directory), hint=_REBUILD_HINT)

    def _file_faults(self, directory: Path) -> Iterator[str]:
        path = directory / ENGINE_FILE
        size_bytes = path.stat().st_size if path.is_file() else 0
        if size_bytes != self.engine_bytes:
            yield f"{ENGINE_FILE} is truncated: it must have {self.engine_bytes} bytes, got {size_bytes}"
        elif sha256_of(path) != self.engine_sha256:
            yield f"{ENGINE_FILE} was modified after the build: its SHA-256 digest differs"
        if plans.read(directory).graph_sha256 != self.graph_sha256:
            yield f"{ENGINE_FILE} was built from a different graph than the plan in its folder"

    def _version_faults(self, tensorrt: str) -> Iterator[str]:
        built_with, loaded_by = _version_tuple(self.tensorrt), _version_tuple(tensorrt)
        if self.version_compatible:
            is_loadable = loaded_by[0] == built_with[0] and loaded_by >= built_with
        else:
            is_loadable = loaded_by == built_with
        if not is_loadable:
            or_later = f" or a later {built_with[0]}.x" if self.version_compatible else ""
            yield f"the engine requires TensorRT {self.tensorrt}{or_later}, got {tensorrt}"

    def _gpu_faults(self, gpu: GpuIdentity) -> Iterator[str]:
        built_for = self.gpu
        if self.hardware == "this" and gpu.name != built_for.name:
            yield f"the engine was built for {built_for.name}, got {gpu.name}"
        if self.hardware == "ampere_plus":
            if float(gpu.compute_capability) < _AMPERE:
                yield f"the engine requires compute capability {_AMPERE} or higher, got {gpu.compute_capability}"
        elif gpu.compute_capability != built_for.compute_capability:
            yield (
                f"the engine requires compute capability {built_for.compute_capability}, got {gpu.compute_capability}"
            )


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
