"""ONNX graphs that others exported, taken in as engines so that they can be measured."""

from __future__ import annotations

from pathlib import Path

from edgeopt.checkpoints import importing, modeling
from edgeopt.core.artifact import Engine, link_file
from edgeopt.core.config_objects import to_config
from edgeopt.errors import InputError
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.runtime import PortableOnnx


def import_graph(path: Path, source: Path, directory: Path) -> Engine:
    """The decoder at `path` as an engine in the empty `directory`.

    `source` is a folder in Hugging Face layout whose `config.json` and tokenizer belong to it. The graph reads
    `input_ids` and gives logits first; keys and values, `attention_mask` and `position_ids` as most exporters have them
    may stand beside. Raises InputError for anything else, and for weights outside the graph's folder.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    spec = importing.spec_of(source)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no class with onnx's
        raise InputError(f"it is no ONNX graph ({error})", location=str(path)) from error
    inputs = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    unknown = sorted(name for name in inputs - graph.KNOWN_INPUTS if not name.startswith("past"))
    if graph.INPUT_IDS not in inputs or unknown:
        raise InputError(
            f"nothing is known of the graph's input {unknown[0]!r}"
            if unknown
            else f"the graph has no {graph.INPUT_IDS}",
            location=str(path),
            hint="Export a decoder-only language model, as transformers names its inputs",
        )
    folder = path.parent.resolve()
    for tensor in filter(uses_external_data, model.graph.initializer):
        location = next(entry.value for entry in tensor.external_data if entry.key == "location")
        file = (folder / location).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            raise InputError(f"its weights lie in {location!r}, which is not beside it", location=str(path))
        if not (directory / location).exists():
            link_file(file, directory / location)
    link_file(path, directory / graph.GRAPH_FILE)
    modeling.carry(source, directory)
    link_file(source / "config.json", directory / "config.json")
    made_by = {"runtime": to_config(PortableOnnx()), "source": str(path)}
    return Engine.seal(directory, format=PortableOnnx.format, spec=spec, made_by=made_by)
