"""Rewrite an exported graph for an opset or a file format version that PyTorch's exporter does not write.

An operator that changed after the requested opset is rewritten in its older form. If that is impossible, an error names
it. Sources: https://github.com/onnx/onnx/blob/main/docs/Changelog.md and docs/Versioning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeopt.errors import BuildError

EXPORTER_MIN_OPSET = 18
"""The oldest opset that PyTorch's exporter writes."""


def lower(model: ir.Model, opset: int) -> None:
    """Lower a model in place to `opset`. It was exported with `max(opset, EXPORTER_MIN_OPSET)`.

    Raises BuildError for an operator that has no equivalent in the opset.
    """
    if opset < EXPORTER_MIN_OPSET:
        for node in model.graph.all_nodes():
            schema = onnx.defs.get_schema(node.op_type, EXPORTER_MIN_OPSET, node.domain)
            if schema.since_version > opset and not _LOWERINGS.get(node.op_type, _reject)(node):
                raise BuildError(
                    f"opset {opset} does not support {node.op_type} as this model uses it",
                    location="runtime.opset",
                    hint=f"Use opset {EXPORTER_MIN_OPSET}",
                )
        model.graph.opset_imports[""] = opset
        RemoveUnusedNodesPass()(model)
    min_ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, min_ir_version)  # consumers of that opset reject newer files


def _lower_reduce(node: ir.Node) -> bool:
    """Move the axes from an input to an attribute. Without axes, the older form always reduces all of them."""
    axes_input = node.inputs[1] if len(node.inputs) > 1 else None
    axes = ir.convenience.get_const_tensor(axes_input) if axes_input is not None else None
    noop = node.attributes.pop("noop_with_empty_axes", None)
    if axes_input is None:
        return noop is None or not noop.as_int()
    if axes is None or not axes.size:
        return False
    node.resize_inputs(1)
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    return True


def _lower_split(node: ir.Node) -> bool:
    """Drop the number of outputs. Without sizes, the older form always splits into equal parts."""
    if node.attributes.pop("num_outputs", None) is None:
        return True
    axis = node.attributes.get_int("axis", 0)
    sizes = {None if value.shape is None else value.shape[axis] for value in node.outputs}
    return len(sizes) == 1 and isinstance(sizes.pop(), int)


def _lower_scatter(node: ir.Node) -> bool:
    """Keep the node, unless it reduces by maximum or minimum, which the older form does not support."""
    return node.attributes.get_string("reduction", "none") not in ("max", "min")


def _reject(_: ir.Node) -> bool:
    return False


_LOWERINGS: Mapping[str, Callable[[ir.Node], bool]] = {
    "ReduceMax": _lower_reduce,
    "ReduceMean": _lower_reduce,
    "ScatterElements": _lower_scatter,
    "Split": _lower_split,
}
"""Rewrite a node as opset 17 defines it and return True, or return False if that is impossible. Keys are operators."""
