"""Test that lint reports each known slow path of ONNX Runtime's kernels and nothing else."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeopt.runtimes.onnxruntime_common.lint import slow_paths


def save_graph(
    tmp_path, *, accuracy_level=4, zero_points=None, g_idx=None, attention="GroupQueryAttention", bits=4, block_size=32
):
    """Save a graph of one MatMulNBits and one attention node and return its path."""
    tensors = [numpy_helper.from_array(np.zeros((4, 1, 16), np.uint8), "weight")]
    tensors.append(numpy_helper.from_array(np.zeros(4, np.float32), "scales"))
    inputs = ["x", "weight", "scales", "", ""]
    for index, (name, array) in enumerate((("zero_points", zero_points), ("g_idx", g_idx)), start=3):
        if array is not None:
            tensors.append(numpy_helper.from_array(array, name))
            inputs[index] = name
    attributes = {"K": 32, "N": 4, "bits": bits, "block_size": block_size}
    if accuracy_level is not None:
        attributes["accuracy_level"] = accuracy_level
    nodes = [
        helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes),
        helper.make_node(attention, ["y"], ["z"], domain="com.microsoft"),
    ]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), path)
    return path


def test_fast_graph_has_no_findings(tmp_path):
    assert slow_paths(save_graph(tmp_path, zero_points=np.zeros((4, 1), np.uint8))) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"accuracy_level": None}, "accuracy_level"),
        ({"accuracy_level": 0}, "accuracy_level"),
        ({"zero_points": np.zeros((4, 1), np.float32)}, "float zero-points"),
        ({"g_idx": np.zeros(32, np.int32)}, "g_idx"),
        ({"bits": 2, "block_size": 16}, "2 bits in blocks of 16"),
        ({"attention": "MultiHeadAttention"}, "not fused"),
    ],
)
def test_slow_path_is_reported(tmp_path, values, expected):
    (finding,) = slow_paths(save_graph(tmp_path, **values))
    assert expected in finding
