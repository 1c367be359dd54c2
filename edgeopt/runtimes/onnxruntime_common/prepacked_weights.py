"""Store prepacked weights, in the layout of this CPU's kernels, so that sessions open faster and share one mapped copy.

ONNX Runtime packs each weight when it opens a graph, and uses the stored copy if it equals the result. On a CPU with
other kernels, each process packs its own copy instead. The file therefore also keeps the original weights and takes
about twice the space. Specification: onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgeopt.core.model_spec import ModelSpec
from edgeopt.errors import BuildError, ConfigError

_CONFIG_ENTRIES: Mapping[str, str] = {
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}


def check(spec: ModelSpec) -> None:
    """Raise ConfigError if the weights are fp16, which ONNX Runtime packs as fp32."""
    if spec.weight_dtype == "fp16":
        raise ConfigError(
            "`packed_on_disk` must be false for fp16 weights: their prepacked copy is fp32 and takes six times the "
            "space",
            location="runtime.packed_on_disk",
            hint="Use false, or store the weights in fp32 or quantized",
        )


def save(graph: Path) -> None:
    """Replace the graph and its data file with the optimized graph and prepacked weights.

    Raises:
        BuildError: ONNX Runtime cannot open the graph.
    """
    import onnxruntime

    data = graph.with_name(f"{graph.name}.data")
    with tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        saved = Path(scratch) / graph.name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(saved)
        data_entry = {"session.optimized_model_external_initializers_file_name": data.name}
        for key, value in {**_CONFIG_ENTRIES, **data_entry}.items():
            options.add_session_config_entry(key, value)
        try:
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise BuildError(f"ONNX Runtime cannot pack the weights of {graph.name}: {error}") from error
        for file in (graph, data):
            (saved.parent / file.name).replace(file)


def prepacked_bytes(spec: ModelSpec, name: str) -> int:
    """Return the bytes of a unit's prepacked matrices.

    Each block of a weight-only scheme also has a scale and a sum of its weights, both fp32.
    """
    rows, columns = spec.matrices[name]
    scheme = spec.schemes.get(name)
    if scheme is None:
        return 4 * rows * columns
    if scheme.inputs != "float":
        return scheme.size_bytes(rows, columns)
    blocks = -(-columns // scheme.block_size)
    return rows * blocks * (scheme.block_size * scheme.bits // 8 + 8)
