"""Graphs in the form of older consumers compute the same, and what those do not know is told by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.stages import build_engine

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.errors import BuildError, ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.onnx.opset_lowering import OLDEST, lower
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.onnx.test_onnx import EVERY, in_torch, taken_in
from runtimes.test_families import PROMPT

SHAPE = [2, 3, 6]


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {"shards": 3, "kv_resident": "0 B"}),
        *(pytest.param(family, {}, marks=pytest.mark.slow) for family in EVERY),
        *(pytest.param("llama", {"keys_values": kind}, marks=pytest.mark.slow) for kind in ("fp16", "int8", "int4")),
    ],
    ids=str,
)
def test_every_family_is_lowered_and_computes_as_torch(
    family: str, values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint, runtime = taken_in(family, tiny_model, tmp_path), PortableOnnx(opset=17, **values)
    engine = build_engine(runtime, checkpoint, tmp_path / "engine")
    for path in engine.directory.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        written = onnx.load(path, load_external_data=False)
        assert (written.opset_import[0].version, written.ir_version) == (17, 8)
    lossy = {"fp16": 1e-3, "int8": 5e-3, "int4": 0.05}.get(values.get("keys_values", ""), 1e-4)
    session = runtime.open(engine, threads=1)
    assert relative_error(in_torch(checkpoint), session.logits(PROMPT)) < lossy
    assert runtime.lint(engine) == []
    session.close()


def model(node: onnx.NodeProto, *tensors: onnx.TensorProto, inputs: int = 1) -> onnx.ModelProto:
    """A graph of one operator, as of OLDEST, that reads `x` and perhaps more inputs that are no constants."""
    value = helper.make_tensor_value_info
    given = [value("x", TensorProto.FLOAT, SHAPE), value("axes", TensorProto.INT64, [1])][:inputs]
    outputs = [value(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", OLDEST)]
    made = helper.make_graph([node], "one", given, outputs, tensors)
    return onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=opsets, ir_version=10))


def lowered(given: onnx.ModelProto, opset: int = 17) -> onnx.ModelProto:
    read = ir.from_proto(given)
    lower(read, opset)
    found = ir.to_proto(read)
    onnx.checker.check_model(found, full_check=True)
    return found


def computed(given: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(given.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": np.random.default_rng(0).random(SHAPE, np.float32)})
    return found


AXES = numpy_helper.from_array(np.array([-1]), "axes")
PLACES = numpy_helper.from_array(np.array([[[1, 0]]]), "places")
NEW = numpy_helper.from_array(np.ones((1, 1, 2), np.float32), "new")
SIZES = numpy_helper.from_array(np.array([1, 5]), "sizes")


@pytest.mark.parametrize(
    ("node", "tensors"),
    [
        (helper.make_node("ReduceMean", ["x", "axes"], ["y"], noop_with_empty_axes=0), [AXES]),
        (helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0, noop_with_empty_axes=1), [AXES]),
        (helper.make_node("ReduceMax", ["x"], ["y"]), []),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=-1, num_outputs=2), []),
        (helper.make_node("Split", ["x"], ["y", "z"], num_outputs=2), []),
        (helper.make_node("Split", ["x", "sizes"], ["y", "z"], axis=2), [SIZES]),
        (helper.make_node("ScatterElements", ["x", "places", "new"], ["y"], axis=2), [PLACES, NEW]),
        (helper.make_node("ScatterElements", ["x", "places", "new"], ["y"], reduction="add"), [PLACES, NEW]),
        (helper.make_node("Neg", ["x"], ["y"]), []),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "",
)
def test_an_operator_computes_the_same_in_its_older_form(node: onnx.NodeProto, tensors: list[Any]) -> None:
    given = model(node, *tensors)
    found = lowered(given)
    assert (found.opset_import[0].version, found.ir_version) == (17, 8)
    for one, other in zip(computed(found), computed(given), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("node", "tensors", "inputs"),
    [
        (helper.make_node("Mish", ["x"], ["y"]), [], 1),
        (helper.make_node("ReduceMean", ["x", "axes"], ["y"]), [], 2),
        (helper.make_node("ReduceMean", ["x"], ["y"], noop_with_empty_axes=1), [], 1),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2), [], 1),
        (helper.make_node("ScatterElements", ["x", "places", "new"], ["y"], reduction="max"), [PLACES, NEW], 1),
    ],
    ids=["new operator", "axes computed", "no axes, nothing reduced", "parts of two sizes", "larger of two"],
)
def test_what_the_older_opset_does_not_know_is_told_by_its_name(
    node: onnx.NodeProto, tensors: list[Any], inputs: int
) -> None:
    with pytest.raises(BuildError, match=rf"runtime\.opset: opset 17 knows no {node.op_type} as .*\. Give 18"):
        lowered(model(node, *tensors, inputs=inputs))


@pytest.mark.parametrize(("opset", "version"), [(17, 8), (18, 8), (20, 9), (21, 10), (23, 10)])
def test_a_file_is_of_no_newer_form_than_its_opset(opset: int, version: int) -> None:
    given = model(helper.make_node("Neg", ["x"], ["y"]))
    given.opset_import[0].version = max(opset, OLDEST)
    assert lowered(given, opset).ir_version == version


def test_17_knows_no_weights_in_blocks(tiny_model: Path, tmp_path: Path) -> None:
    spec = taken_in("llama", tiny_model, tmp_path).spec
    with pytest.raises(ConfigError, match="opset 17 knows no rounded weights in blocks"):
        PortableOnnx(opset=17).check(Quantize().plan(spec))
    PortableOnnx(opset=17).check(Quantize(weights="fp16").plan(spec))
