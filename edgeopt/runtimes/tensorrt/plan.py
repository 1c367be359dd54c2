"""Create, check and read build plans: graph, optimization profiles, settings and calibrated ranges, without a GPU."""

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
from edgeopt.runtimes.decoding.chunked_prefill import resolve_chunk_tokens
from edgeopt.runtimes.onnx.graph import GRAPH_FILE, INPUT_IDS, PAST_PREFIX, ROWS, cache_names
from edgeopt.runtimes.tensorrt import graph_checks
from edgeopt.runtimes.tensorrt.library import STRONGLY_TYPED_ONLY

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress
    from edgeopt.runtimes.tensorrt.runtime import TensorRt

PLAN_FILE, ENGINE_FILE = "plan.json", "model.engine"
PREFILL, DECODE = "prefill", "decode"
OPT_PROMPT_TOKENS = 128
"""Prompt length in tokens that TensorRT optimizes the prefill profile for."""
_TRTEXEC_FLAGS: Mapping[str, str] = {
    "refit": "--refit",
    "version_compatible": "--versionCompatible",
}

Shape = tuple[int, ...]
ShapeRanges = Mapping[str, tuple[Shape, Shape, Shape]]
"""Minimum, optimum and maximum shape of each input of one optimization profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that an engine is built from.

    Attributes:
        graph: path of the ONNX file; its weights are in the same folder.
        graph_sha256: digest of the ONNX file at planning time. The artifact's manifest covers the weights.
        profiles: optimization profiles by name, in the engine's order.
        input_ranges: largest input magnitude of each unit with 8-bit inputs, measured on calibration text.
    """

    runtime: TensorRt
    graph: Path
    graph_sha256: str
    profiles: Mapping[str, ShapeRanges]
    input_ranges: Mapping[str, float]

    @property
    def trtexec(self) -> str:
        """Return the command line of NVIDIA's `trtexec` that builds the same engine."""
        words = ["trtexec", f"--onnx={GRAPH_FILE}", f"--saveEngine={ENGINE_FILE}"]
        if self.runtime.min_version < STRONGLY_TYPED_ONLY:
            words.append("--stronglyTyped")
        for number, ranges in enumerate(self.profiles.values()):
            words.append(f"--profile={number}")
            for index, kind in enumerate(("min", "opt", "max")):
                shapes = (f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in ranges.items())
                words.append(f"--{kind}Shapes={','.join(shapes)}")
        words.append(f"--builderOptimizationLevel={self.runtime.optimization_level}")
        words += [flag for name, flag in _TRTEXEC_FLAGS.items() if getattr(self.runtime, name)]
        if self.runtime.workspace_mib:
            words.append(f"--memPoolSize=workspace:{self.runtime.workspace_mib}M")
        if self.runtime.weights_mib:
            words.append("--allowWeightStreaming")
        if self.runtime.hardware != "this":
            words.append(f"--hardwareCompatibilityLevel={_camel_case(self.runtime.hardware)}")
        return " ".join(words)

    def check(self) -> None:
        """Raise BuildError with every known reason why TensorRT would reject this plan. Needs no GPU."""
        if (actual := sha256_of(self.graph)) != self.graph_sha256:
            raise BuildError(
                f"the graph was modified after planning: its SHA-256 digest must be {self.graph_sha256[:12]}…, "
                f"got {actual[:12]}…",
                location=str(self.graph),
                hint="Build the plan again",
            )
        faults = [
            *_profile_faults(self.graph, self.profiles),
            *graph_checks.find_faults(self.graph, self.runtime.min_version),
        ]
        if faults:
            raise BuildError("; ".join(faults), location=str(self.graph), hint="Use another recipe or runtime")

    def write(self, directory: Path) -> None:
        """Write the plan as JSON into `directory`."""
        document = {
            "graph": GRAPH_FILE,
            "graph_sha256": self.graph_sha256,
            "profiles": self.profiles,
            "input_ranges": self.input_ranges,
            "runtime": to_config(self.runtime),
            "trtexec": self.trtexec,
        }
        (directory / PLAN_FILE).write_text(json.dumps(document, indent=1) + "\n")


def create(runtime: TensorRt, checkpoint: Checkpoint, directory: Path, progress: Progress) -> Plan:
    """Export the graph of `checkpoint` into the empty `directory`, and write a checked plan beside it.

    Raises:
        BuildError: if the export fails or TensorRT would reject the graph.
    """
    from edgeopt.runtimes.onnx import export, qdq

    spec = checkpoint.spec
    fp16_units = spec.matrices.keys() - runtime.fp32_units(spec)
    opset = graph_checks.opset_for(runtime.min_version)
    options = export.ExportOptions(opset=opset, fp16_units=frozenset(fp16_units), signed_inputs=True)
    export.export_checkpoint(checkpoint, directory, options=options, progress=progress)
    prompt_tokens = resolve_chunk_tokens(directory, spec, runtime.prompt_tokens)
    calibrated = modeling.input_ranges(checkpoint)
    plan = Plan(
        runtime=runtime,
        graph=directory / GRAPH_FILE,
        graph_sha256=sha256_of(directory / GRAPH_FILE),
        profiles={
            PREFILL: _shape_ranges(spec, min(prompt_tokens, spec.context_length)),
            DECODE: _shape_ranges(spec, 1),
        },
        input_ranges={unit: qdq.max_magnitude(*quantization) for unit, quantization in calibrated.items()},
    )
    progress("checking the TensorRT build plan")
    plan.check()
    plan.write(directory)
    return plan


def read(directory: Path) -> Plan:
    """Read the plan in `directory`. Raise InputError if it is missing or unreadable."""
    path = directory / PLAN_FILE
    try:
        document = json.loads(path.read_text())
        profiles: Mapping[str, ShapeRanges] = {
            profile: {
                name: (tuple(min_shape), tuple(opt_shape), tuple(max_shape))
                for name, (min_shape, opt_shape, max_shape) in ranges.items()
            }
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
            "the folder holds no TensorRT build plan",
            location=str(directory),
            hint="Give the folder of an engine of runtime=tensorrt",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the build plan is unreadable ({error})", location=str(path), hint="Build the plan again"
        ) from error


def _shape_ranges(spec: ModelSpec, max_tokens: int) -> ShapeRanges:
    """Return the input shapes of one sequence with up to `max_tokens` new tokens and a cache of up to full context."""
    cache_sizes = [(layer.kv_heads, spec.head_size) for layer in spec.layers for _ in ("key", "value")]
    context = spec.context_length
    return {
        INPUT_IDS: ((1, 1), (1, min(OPT_PROMPT_TOKENS, max_tokens)), (1, max_tokens)),
        ROWS: ((1,), (1,), (max_tokens,)),
        **{
            name: ((1, heads, 1, size), (1, heads, context, size), (1, heads, context, size))
            for name, (heads, size) in zip(cache_names(len(spec.layers), PAST_PREFIX), cache_sizes, strict=True)
        },
    }


def _profile_faults(path: Path, profiles: Mapping[str, ShapeRanges]) -> list[str]:
    """Return each mismatch between the optimization profiles and the inputs of the ONNX graph at `path`.

    Every input with a dynamic dimension needs shapes. Shapes must rise from minimum to maximum and agree with the
    graph's fixed dimensions.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    graph_shapes = {
        value.name: [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in constants
    }
    faults = []
    for profile, ranges in profiles.items():
        faults += [f"the graph has no input {name}" for name in ranges.keys() - graph_shapes.keys()]
        for name, graph_shape in graph_shapes.items():
            shapes = ranges.get(name)
            if shapes is None:
                if -1 in graph_shape:
                    faults.append(f"profile {profile} has no shapes for {name}")
            elif not _match(graph_shape, shapes):
                faults.append(f"profile {profile}: the shapes of {name} must match {graph_shape}, got {shapes}")
    return faults


def _match(graph_shape: Sequence[int], shapes: tuple[Shape, Shape, Shape]) -> bool:
    """Return whether minimum ≤ optimum ≤ maximum, and all three agree with the fixed dimensions of `graph_shape`."""
    if any(len(shape) != len(graph_shape) for shape in shapes):
        return False
    rising = (0 < low <= optimum <= high for low, optimum, high in zip(*shapes, strict=True))
    fixed = (graph_dim in (-1, dim) for shape in shapes for graph_dim, dim in zip(graph_shape, shape, strict=True))
    return all(rising) and all(fixed)


def _camel_case(words: str) -> str:
    first, *others = words.split("_")
    return first + "".join(map(str.capitalize, others))
