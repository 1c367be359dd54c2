"""Import ONNX graphs from other exporters as engines, so that they can be measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.checkpoints import importing, modeling
from edgeopt.core.artifact import Engine, link_file
from edgeopt.core.config_objects import to_config
from edgeopt.errors import InputError
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.runtime import PortableOnnx

if TYPE_CHECKING:
    import onnx


def import_graph(path: Path, source: Path, directory: Path) -> Engine:
    """Seal the decoder graph at `path` as an engine in the empty `directory`.

    The graph must have the input `input_ids`, and logits as its first output. It may have the other inputs of
    `graph.KNOWN_INPUTS`, and cached keys and values as inputs whose names start with `past`.

    Args:
        source: folder in Hugging Face layout with the model's `config.json` and tokenizer.

    Raises:
        InputError: the graph is unreadable, has other inputs, or has weights outside its folder.
    """
    import onnx

    spec = importing.spec_of(source)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # errors of protobuf and of onnx have no common base class
        raise InputError(f"the file is not a readable ONNX graph ({error})", location=str(path)) from error
    _check_inputs(model, path)
    _link_weights(model, path, directory)
    link_file(path, directory / graph.GRAPH_FILE)
    modeling.copy_model_files(source, directory)
    link_file(source / "config.json", directory / "config.json")
    made_by = {"runtime": to_config(PortableOnnx()), "source": str(path)}
    return Engine.seal(directory, format=PortableOnnx.format, spec=spec, made_by=made_by)


def _check_inputs(model: onnx.ModelProto, path: Path) -> None:
    """Raise InputError if the graph has no input `input_ids`, or an input that a session cannot feed."""
    inputs = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    unknown = sorted(name for name in inputs - graph.KNOWN_INPUTS if not name.startswith("past"))
    if graph.INPUT_IDS not in inputs or unknown:
        raise InputError(
            f"the graph has the unsupported input {unknown[0]!r}"
            if unknown
            else f"the graph must have the input `{graph.INPUT_IDS}`",
            location=str(path),
            hint="Export a decoder-only language model with the input names of transformers",
        )


def _link_weights(model: onnx.ModelProto, path: Path, directory: Path) -> None:
    """Link the weight files of the graph at `path` into `directory`. Raises InputError if one is not in its folder."""
    from onnx.external_data_helper import uses_external_data

    folder = path.parent.resolve()
    for tensor in filter(uses_external_data, model.graph.initializer):
        location = next(entry.value for entry in tensor.external_data if entry.key == "location")
        file = (folder / location).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            raise InputError(
                f"the graph's weights must be in its folder, got {location!r}",
                location=str(path),
                hint="Move the weights beside the graph, or export it again",
            )
        if not (directory / location).exists():
            link_file(file, directory / location)
