"""Exported graphs in the words of older consumers: opsets that torch does not write, and versions of the file's form.

An operator whose form is newer than the wanted opset is written as that opset knows it; one that cannot be is told by
its name. Sources: https://github.com/onnx/onnx/blob/main/docs/Changelog.md and docs/Versioning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeopt.errors import BuildError

OLDEST = 18
"""The oldest opset that torch's exporter writes."""


def lower(model: ir.Model, opset: int) -> None:
    """Have a model that was exported with OLDEST, or `opset` where that is newer, in the form of `opset`.

    Raises BuildError for an operator that this opset does not know.
    """
    if opset < OLDEST:
        for node in model.graph.all_nodes():
            newer = onnx.defs.get_schema(node.op_type, OLDEST, node.domain).since_version > opset
            if newer and not _LOWERED.get(node.op_type, _never)(node):
                raise BuildError(
                    f"opset {opset} knows no {node.op_type} as this model needs it",
                    location="runtime.opset",
                    hint=f"Give {OLDEST}",
                )
        model.graph.opset_imports[""] = opset
        RemoveUnusedNodesPass()(model)
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, needed)  # consumers of that time refuse a newer one


def _reduced(node: ir.Node) -> bool:
    """Axes were an attribute before they became an input, and none were all of them, always."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = ir.convenience.get_const_tensor(given) if given is not None else None
    none = node.attributes.pop("noop_with_empty_axes", None)
    if given is None:
        return none is None or not none.as_int()
    if axes is None or not axes.size:
        return False
    node.resize_inputs(1)
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    return True


def _split(node: ir.Node) -> bool:
    """Parts were equally large wherever no sizes were given, and as many as there are outputs."""
    if node.attributes.pop("num_outputs", None) is None:
        return True
    axis = node.attributes.get_int("axis", 0)
    sizes = {None if value.shape is None else value.shape[axis] for value in node.outputs}
    return len(sizes) == 1 and isinstance(sizes.pop(), int)


def _scattered(node: ir.Node) -> bool:
    """The larger and the smaller value are newer ways to put two together; what replaces the old one is as it was."""
    return node.attributes.get_string("reduction", "none") not in ("max", "min")


def _never(_: ir.Node) -> bool:
    return False


_LOWERED: Mapping[str, Callable[[ir.Node], bool]] = {
    "ReduceMax": _reduced,
    "ReduceMean": _reduced,
    "ScatterElements": _scattered,
    "Split": _split,
}
"""By operator of OLDEST whose form is newer than 17: writes a node as 17 knows it; False where it cannot."""
