"""The plan of an engine: graph, optimization profiles, settings and calibrated ranges, checked without a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.checkpoints import modeling
from edgeopt.core.artifact import sha256_of
from edgeopt.core.config_objects import instantiate, to_config
from edgeopt.errors import BuildError, InputError
from edgeopt.runtimes.decoding.chunked_prefill import at_once
from edgeopt.runtimes.onnx.graph import GRAPH_FILE, INPUT_IDS, PAST_PREFIX, ROWS, cache_names
from edgeopt.runtimes.tensorrt import graph
from edgeopt.runtimes.tensorrt.library import STRONGLY_TYPED_ONLY

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress
    from edgeopt.runtimes.tensorrt.runtime import TensorRt

FILE, ENGINE = "plan.json", "model.engine"
PREFILL, DECODE = "prefill", "decode"
USUAL_TOKENS = 128
"""Of a prompt, for which kernels are chosen."""
_FLAGS: Mapping[str, str] = {
    "refit": "--refit",
    "version_compatible": "--versionCompatible",
}

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
"""The least, usual and greatest shape of each input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an engine is built from.

    Attributes:
        graph: the ONNX file, with its weights beside it.
        graph_sha256: of that file as it was planned; its weights are in the artifact's manifest.
        profiles: optimization profiles by name, in the order in which the engine numbers them.
        input_ranges: the largest magnitude of the inputs of units that take them in 8 bits, from calibration text.
    """

    runtime: TensorRt
    graph: Path
    graph_sha256: str
    profiles: Mapping[str, Ranges]
    input_ranges: Mapping[str, float]

    @property
    def trtexec(self) -> str:
        """The line that builds the same engine with NVIDIA's own program."""
        words = ["trtexec", f"--onnx={GRAPH_FILE}", f"--saveEngine={ENGINE}"]
        if self.runtime.oldest < STRONGLY_TYPED_ONLY:
            words.append("--stronglyTyped")
        for number, ranges in enumerate(self.profiles.values()):
            words.append(f"--profile={number}")
            for index, kind in enumerate(("min", "opt", "max")):
                shapes = (f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in ranges.items())
                words.append(f"--{kind}Shapes={','.join(shapes)}")
        words.append(f"--builderOptimizationLevel={self.runtime.optimization_level}")
        words += [flag for name, flag in _FLAGS.items() if getattr(self.runtime, name)]
        if self.runtime.workspace_mib:
            words.append(f"--memPoolSize=workspace:{self.runtime.workspace_mib}M")
        if self.runtime.weights_mib:
            words.append("--allowWeightStreaming")
        if self.runtime.hardware != "this":
            words.append(f"--hardwareCompatibilityLevel={_camel(self.runtime.hardware)}")
        return " ".join(words)

    def check(self) -> None:
        """BuildError with everything for which TensorRT would refuse it, as far as that is known without a GPU."""
        if (found := sha256_of(self.graph)) != self.graph_sha256:
            raise BuildError(
                f"the graph was changed since it was planned (sha256 {found[:12]}, planned {self.graph_sha256[:12]})",
                location=str(self.graph),
                hint="Build the plan again",
            )
        faults = [*_misfits(self.graph, self.profiles), *graph.faults(self.graph, self.runtime.oldest)]
        if faults:
            raise BuildError("; ".join(faults), location=str(self.graph), hint="Use another recipe or runtime")

    def write(self, directory: Path) -> None:
        document = {
            "graph": GRAPH_FILE,
            "graph_sha256": self.graph_sha256,
            "profiles": self.profiles,
            "input_ranges": self.input_ranges,
            "runtime": to_config(self.runtime),
            "trtexec": self.trtexec,
        }
        (directory / FILE).write_text(json.dumps(document, indent=1) + "\n")


def draw(runtime: TensorRt, checkpoint: Checkpoint, directory: Path, progress: Progress) -> Plan:
    """Export the graph into the empty `directory` and write the checked plan beside it. Raises BuildError."""
    from edgeopt.runtimes.onnx import export, qdq

    spec = checkpoint.spec
    halved = spec.matrices.keys() - runtime.units_in_fp32(spec)
    options = export.ExportOptions(opset=graph.opset(runtime.oldest), fp16_units=frozenset(halved), signed_inputs=True)
    export.build(checkpoint, directory, options=options, progress=progress)
    prompt_tokens = at_once(directory, spec, runtime.prompt_tokens)
    plan = Plan(
        runtime=runtime,
        graph=directory / GRAPH_FILE,
        graph_sha256=sha256_of(directory / GRAPH_FILE),
        profiles={
            PREFILL: _ranges(spec, min(prompt_tokens, spec.context_length)),
            DECODE: _ranges(spec, 1),
        },
        input_ranges={unit: qdq.max_magnitude(*found) for unit, found in modeling.input_ranges(checkpoint).items()},
    )
    progress("checking the plan for TensorRT")
    plan.check()
    plan.write(directory)
    return plan


def read(directory: Path) -> Plan:
    """The plan in `directory`. Raises InputError."""
    path = directory / FILE
    try:
        document = json.loads(path.read_text())
        profiles: Mapping[str, Ranges] = {
            profile: {name: (tuple(low), tuple(usual), tuple(high)) for name, (low, usual, high) in ranges.items()}
            for profile, ranges in document["profiles"].items()
        }
        return Plan(
            runtime=instantiate(document["runtime"], str(path)),
            graph=directory / GRAPH_FILE,
            graph_sha256=document["graph_sha256"],
            profiles=profiles,
            input_ranges=document["input_ranges"],
        )
    except FileNotFoundError as error:
        raise InputError(
            "no plan is here", location=str(directory), hint="Give an engine of runtime=tensorrt"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the plan cannot be read ({error})", location=str(path), hint="Build it again") from error


def _ranges(spec: ModelSpec, most_tokens: int) -> Ranges:
    """Shapes for at most so many tokens at once, of one sequence, with room for all of the context."""
    kept = [(layer.kv_heads, spec.head_size) for layer in spec.layers for _ in ("key", "value")]
    whole = spec.context_length
    return {
        INPUT_IDS: ((1, 1), (1, min(USUAL_TOKENS, most_tokens)), (1, most_tokens)),
        ROWS: ((1,), (1,), (most_tokens,)),
        **{
            name: ((1, heads, 1, size), (1, heads, whole, size), (1, heads, whole, size))
            for name, (heads, size) in zip(cache_names(len(spec.layers), PAST_PREFIX), kept, strict=True)
        },
    }


def _misfits(path: Path, profiles: Mapping[str, Ranges]) -> list[str]:
    """Ranges that are none, and inputs whose open sides they leave open or whose given ones they contradict."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    sides = {
        value.name: [side.dim_value if side.HasField("dim_value") else -1 for side in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in constants
    }
    found = []
    for profile, ranges in profiles.items():
        found += [f"the graph has no input {name}" for name in ranges.keys() - sides.keys()]
        for name, given in sides.items():
            shapes = ranges.get(name)
            if shapes is None:
                if -1 in given:
                    found.append(f"profile {profile} has no shapes for {name}")
            elif not _fit(given, shapes):
                found.append(f"profile {profile} gives {name} the shapes {shapes}, and the graph has {given}")
    return found


def _fit(given: Sequence[int], shapes: tuple[Shape, Shape, Shape]) -> bool:
    if any(len(shape) != len(given) for shape in shapes):
        return False
    rising = (0 < least <= usual <= most for least, usual, most in zip(*shapes, strict=True))
    fixed = (side in (-1, own) for shape in shapes for side, own in zip(given, shape, strict=True))
    return all(rising) and all(fixed)


def _camel(words: str) -> str:
    first, *others = words.split("_")
    return first + "".join(map(str.capitalize, others))
