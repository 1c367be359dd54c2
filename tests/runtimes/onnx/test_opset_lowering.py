"""Test that lowered graphs compute the same, and that errors name the operators without an older form."""

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
from edgeopt.runtimes.onnx.opset_lowering import EXPORTER_MIN_OPSET, lower
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.onnx.random_models import ALL_FAMILIES, import_random_checkpoint, torch_logits
from runtimes.test_families import PROMPT

SHAPE = [2, 3, 6]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"shards": 3, "kv_resident": "0 B"}),
        *(pytest.param(family, {}, marks=pytest.mark.slow) for family in ALL_FAMILIES),
        *(pytest.param("llama", {"keys_values": name}, marks=pytest.mark.slow) for name in ("fp16", "int8", "int4")),
    ],
    ids=str,
)
def test_lowered_family_matches_pytorch(family: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    checkpoint, runtime = import_random_checkpoint(family, tiny_model, tmp_path), PortableOnnx(opset=17, **options)
    engine = build_engine(runtime, checkpoint, tmp_path / "engine")
    for path in engine.directory.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        written = onnx.load(path, load_external_data=False)
        assert (written.opset_import[0].version, written.ir_version) == (17, 8)
    max_error = {"fp16": 1e-3, "int8": 5e-3, "int4": 0.05}.get(options.get("keys_values", ""), 1e-4)
    session = runtime.open(engine, threads=1)
    assert relative_error(torch_logits(checkpoint), session.logits(PROMPT)) < max_error
    assert runtime.lint(engine) == []
    session.close()


def make_model(node: onnx.NodeProto, *tensors: onnx.TensorProto, input_count: int = 1) -> onnx.ModelProto:
    """Return a model of one node in opset EXPORTER_MIN_OPSET with the input `x`, and `axes` if there are two."""
    value = helper.make_tensor_value_info
    graph_inputs = [value("x", TensorProto.FLOAT, SHAPE), value("axes", TensorProto.INT64, [1])][:input_count]
    outputs = [value(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", EXPORTER_MIN_OPSET)]
    graph = helper.make_graph([node], "one", graph_inputs, outputs, tensors)
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def lower_model(model: onnx.ModelProto, opset: int = 17) -> onnx.ModelProto:
    ir_model = ir.from_proto(model)
    lower(ir_model, opset)
    lowered = ir.to_proto(ir_model)
    onnx.checker.check_model(lowered, full_check=True)
    return lowered


def run_model(model: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {"x": np.random.default_rng(0).random(SHAPE, np.float32)})
    return outputs


AXES = numpy_helper.from_array(np.array([-1]), "axes")
INDICES = numpy_helper.from_array(np.array([[[1, 0]]]), "indices")
UPDATES = numpy_helper.from_array(np.ones((1, 1, 2), np.float32), "updates")
SCATTER_INPUTS = ["x", "indices", "updates"]
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
        (helper.make_node("ScatterElements", SCATTER_INPUTS, ["y"], axis=2), [INDICES, UPDATES]),
        (helper.make_node("ScatterElements", SCATTER_INPUTS, ["y"], reduction="add"), [INDICES, UPDATES]),
        (helper.make_node("Neg", ["x"], ["y"]), []),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "",
)
def test_lowered_operator_computes_the_same(node: onnx.NodeProto, tensors: list[Any]) -> None:
    model = make_model(node, *tensors)
    lowered = lower_model(model)
    assert (lowered.opset_import[0].version, lowered.ir_version) == (17, 8)
    for output, expected in zip(run_model(lowered), run_model(model), strict=True):
        np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize(
    ("node", "tensors", "input_count"),
    [
        (helper.make_node("Mish", ["x"], ["y"]), [], 1),
        (helper.make_node("ReduceMean", ["x", "axes"], ["y"]), [], 2),
        (helper.make_node("ReduceMean", ["x"], ["y"], noop_with_empty_axes=1), [], 1),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2), [], 1),
        (helper.make_node("ScatterElements", SCATTER_INPUTS, ["y"], reduction="max"), [INDICES, UPDATES], 1),
    ],
    ids=["new operator", "computed axes", "no-op without axes", "unequal parts", "maximum"],
)
def test_operator_without_older_form_is_named(node: onnx.NodeProto, tensors: list[Any], input_count: int) -> None:
    with pytest.raises(
        BuildError, match=rf"runtime\.opset: opset 17 does not support {node.op_type} as .*\. Use opset 18"
    ):
        lower_model(make_model(node, *tensors, input_count=input_count))


@pytest.mark.parametrize(("opset", "version"), [(17, 8), (18, 8), (20, 9), (21, 10), (23, 10)])
def test_ir_version_matches_opset(opset: int, version: int) -> None:
    model = make_model(helper.make_node("Neg", ["x"], ["y"]))
    model.opset_import[0].version = max(opset, EXPORTER_MIN_OPSET)
    assert lower_model(model, opset).ir_version == version


def test_opset_17_rejects_quantized_weights(tiny_model: Path, tmp_path: Path) -> None:
    spec = import_random_checkpoint("llama", tiny_model, tmp_path).spec
    with pytest.raises(ConfigError, match="`opset` must be at least 21 for quantized weights, got 17"):
        PortableOnnx(opset=17).check(Quantize().plan(spec))
    PortableOnnx(opset=17).check(Quantize(weights="fp16").plan(spec))
