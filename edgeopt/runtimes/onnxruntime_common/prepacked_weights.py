"""Weights saved in the layout of this CPU's kernels, so that processes map one copy of them and open it sooner.

ONNX Runtime packs the weights when it opens a graph, and takes what is saved in place of what is equal to it: on a CPU
with other kernels an engine computes all the same, from what that process packed. So the weights stay beside as they
were, and a file takes about twice as much. Specification: onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgeopt.core.model_spec import ModelSpec
from edgeopt.errors import BuildError, ConfigError

_OPTIONS: Mapping[str, str] = {
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}


def check(spec: ModelSpec) -> None:
    if spec.weight_dtype == "fp16":
        raise ConfigError(
            "weights that are stored in fp16 are packed in fp32, and would take six times as much storage",
            location="runtime.packed_on_disk",
            hint="Give false, or keep the weights in fp32 or on a grid",
        )


def save(graph: Path) -> None:
    """Replace the graph, and the one file of its data, by what ONNX Runtime computes with. Raises BuildError."""
    import onnxruntime

    data = graph.with_name(f"{graph.name}.data")
    with tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        saved = Path(scratch) / graph.name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(saved)
        named = {"session.optimized_model_external_initializers_file_name": data.name}
        for key, value in {**_OPTIONS, **named}.items():
            options.add_session_config_entry(key, value)
        try:
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            raise BuildError(f"ONNX Runtime cannot pack the weights of {graph.name}: {error}") from error
        for file in (graph, data):
            (saved.parent / file.name).replace(file)


def packed_bytes(spec: ModelSpec, name: str) -> int:
    """Bytes of a unit's matrices in the layout of the kernels: each block has its scale and a sum, in fp32."""
    rows, columns = spec.matrices[name]
    grid = spec.schemes.get(name)
    if grid is None:
        return 4 * rows * columns
    if grid.inputs != "float":
        return grid.size_bytes(rows, columns)
    blocks = -(-columns // grid.block_size)
    return rows * blocks * (grid.block_size * grid.bits // 8 + 8)
