"""Portable ONNX: standard operators alone, so that every decoder of transformers and every consumer of ONNX fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeopt.core import units
from edgeopt.errors import ConfigError
from edgeopt.runtimes.onnxruntime_common import prepacked_weights
from edgeopt.runtimes.onnxruntime_common.session_options import SessionOptions
from edgeopt.runtimes.weight_types import reject_llamacpp_types

if TYPE_CHECKING:
    from pathlib import Path

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target

OPSETS = (23, 20, 18, 17)
MOST_SHARDS = 99
WEIGHT_BITS, GRID_OPSET = {4, 8}, 21
"""Of weights on a grid, and from which opset on there are blocks of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortableOnnx(SessionOptions):
    """Engines of ONNX Runtime from torch's exporter, with weights in fp32, stored in fp16 or on grids of 4 and 8 bits.

    Attributes:
        opset: version of the ONNX standard; 23 keeps attention and norms as one operator each. 17 is lowered from 18.
        keys_values: the type in which keys and values are kept. In int8 and int4 the last tokens stay as they are;
            each token widens all that is kept of a layer, which takes time and, for one layer at once, memory.
        provider: what ONNX Runtime computes by; its GPU builds have `cuda` and `tensorrt`.
        packed_on_disk: the graph is ONNX Runtime's own then, with operators that are no part of the standard.
        arena: each shard keeps one of its own, which with long contexts is as large as its scores of a prompt.
        cpu_fallback: where the provider cannot be had, the CPU takes its place; else that is an error.
        shards: into which the graph is cut, so that a session may hold a part of the weights.
        resident: weights that stay in memory, such as `512 MiB`, beside which there is room for two shards; the others
            are read from storage for each token. None: all stay.
        kv_resident: keys and values that stay in memory; those of the other shards lie in a file without a name, in the
            folder that TMPDIR names, and are there for each token as exactly. None: all stay.
        kv_window: lossy. Of a sequence, its first four tokens (attention sinks) and at least so many of the last are
            read, and what lies between is forgotten. None: nothing is.
        processes: that share the shards one behind another, as actors of a Ray cluster (RAY_ADDRESS, else one of this
            machine), each with budgets of its own. What they take is in no figure of memory.
        read_ahead: a shard is asked for as a whole while the one before computes; else the kernel reads on by itself
            as weights are needed.
    """

    format: ClassVar[str] = "onnx-2"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("numpy", "onnxruntime")
    SESSION_FIELDS: ClassVar[frozenset[str]] = SessionOptions.SESSION_FIELDS | {
        *("provider", "cpu_fallback", "resident", "kv_resident", "kv_window", "processes", "read_ahead")
    }
    fallback: ClassVar[None] = None
    opset: int = 23
    keys_values: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    cpu_fallback: bool = False
    shards: int = 1
    resident: str | None = None
    kv_resident: str | None = None
    kv_window: int | None = None
    processes: int = 1
    read_ahead: bool = False

    def __post_init__(self) -> None:
        SessionOptions.__post_init__(self)
        if not 1 <= self.shards <= MOST_SHARDS:
            raise ConfigError(f"{self.shards} is not in 1 … {MOST_SHARDS}", location="shards")
        for name, budget_bytes in (("resident", self.resident_bytes), ("kv_resident", self.kv_resident_bytes)):
            if budget_bytes is not None:
                self._require_shards(name)
        if not 1 <= self.processes <= self.shards:
            raise ConfigError(
                f"{self.processes} processes cannot share shards of which there are {self.shards}",
                location="processes",
                hint="Give 1, or as many shards or more",
            )
        if self.processes > 1:
            self._require_cpu("processes")
            if self.affinity is not None:
                raise ConfigError(
                    "processes may lie on hosts whose processors are others",
                    location="affinity",
                    hint="Give null, or processes=1",
                )
        if self.prompt_lookup and (self.kv_window is not None or self.keys_values in ("int8", "int4")):
            raise ConfigError(
                "guesses that were wrong are taken back, and tokens that they drove out of a window do not return",
                location="prompt_lookup",
                hint="Give 0, or kv_window=null with keys_values=fp32 or fp16",
            )
        if self.kv_window is not None:
            self._require_cpu("kv_window")
            if self.kv_window < self.prompt_tokens:
                raise ConfigError(
                    f"{self.kv_window} tokens are fewer than the {self.prompt_tokens} that are read at once",
                    location="kv_window",
                    hint=f"Give {self.prompt_tokens} or more, or fewer prompt_tokens",
                )
        for knob, idle in {"packed_on_disk": False, "huge_pages": False, "mapped_weights": "on_demand"}.items():
            if getattr(self, knob) != idle:
                self._require_cpu(knob)
        if self.resident is not None and self.prepacked and not self.packed_on_disk:
            raise ConfigError(
                "prepacked weights are copies in memory, whatever is resident",
                location="prepacked",
                hint="Give prepacked=false or packed_on_disk=true",
            )
        if self.opset not in OPSETS:
            raise ConfigError(
                f"{self.opset} is no opset that is tried",
                location="opset",
                hint=f"Choose one of: {', '.join(map(str, OPSETS))}",
            )

    @property
    def resident_bytes(self) -> int | None:
        return None if self.resident is None else units.size_bytes(self.resident, "resident")

    @property
    def kv_resident_bytes(self) -> int | None:
        return None if self.kv_resident is None else units.size_bytes(self.kv_resident, "kv_resident")

    @property
    def parted(self) -> bool:
        """Whether shards compute one after another, so that not all has to be in memory at once."""
        return self.resident is not None or self.kv_resident is not None

    def _require_shards(self, location: str) -> None:
        if self.shards == 1:
            raise ConfigError("a graph of one shard is resident as a whole", location=location, hint="Give shards=8")
        self._require_cpu(location)

    def _require_cpu(self, location: str) -> None:
        if self.provider != "cpu":
            raise ConfigError(f"{self.provider} has memory of its own", location=location, hint="Give provider=cpu")

    @property
    def baseline(self) -> Self:
        whole = replace(
            self,
            packed_on_disk=False,
            mapped_weights="on_demand",
            keys_values="fp32",
            kv_window=None,
            prompt_lookup=0,
            resident=None,
            kv_resident=None,
            read_ahead=False,
        )
        return whole if self.processes > 1 else replace(whole, shards=1)

    def check(self, spec: ModelSpec) -> None:
        reject_llamacpp_types(spec)
        if self.processes > 1 and not find_spec("ray"):
            raise ConfigError("Ray is not installed", location="runtime.processes", hint="pip install 'edgeopt[ray]'")
        if self.packed_on_disk:
            prepacked_weights.check(spec)
        if self.keys_values == "int4" and spec.head_size % 2:
            raise ConfigError(
                f"heads of {spec.head_size} channels give no pairs for a byte",
                location="runtime.keys_values",
                hint="Give int8",
            )
        bits = {grid.bits for grid in spec.schemes.values()}
        if spec.kv_cache is not None or not bits <= WEIGHT_BITS:
            what, hint = "weights of 2 bits", "Use runtime=genai"
            if spec.kv_cache is not None:
                what = "keys and values on a grid of calibrated ranges"
                hint = "Give runtime.keys_values=int8 in place of the step, or use runtime=genai"
            raise ConfigError(f"portable ONNX knows no {what}", location="runtime", hint=hint)
        if bits and self.opset < GRID_OPSET:
            raise ConfigError(
                f"opset {self.opset} knows no rounded weights in blocks", location="opset", hint=f"Give {OPSETS[0]}"
            )

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        from edgeopt.runtimes.onnx.predict import predictions

        return predictions(spec, self, target, carried_bytes=carried_bytes)

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        from edgeopt.runtimes.onnx import export, graph, shards

        options = export.ExportOptions(opset=self.opset, keys_values=self.keys_values)
        export.build(checkpoint, directory, options=options, progress=progress)
        if self.packed_on_disk:
            prepacked_weights.save(directory / graph.GRAPH_FILE)
        if self.shards > 1:
            shards.split(directory, self.shards)

    def lint(self, engine: Engine) -> list[str]:
        from edgeopt.runtimes.onnx import graph

        found = [] if self.packed_on_disk else graph.nonstandard_operators(engine.directory / graph.GRAPH_FILE)
        unfused = self.graph_optimization in ("none", "basic")
        if unfused and any(grid.inputs != "dynamic" for grid in engine.spec.schemes.values()):
            found.append(f"graph_optimization={self.graph_optimization} widens rounded weights for each token")
        return found

    def open(self, engine: Engine, *, threads: int) -> Session:
        engine.require_format(self.format)
        if self.processes > 1:
            from edgeopt.runtimes.onnx.ray_session import RaySession

            return RaySession(self, engine, threads)
        from edgeopt.runtimes.onnx.session import PortableSession

        return PortableSession(self, engine, threads)
