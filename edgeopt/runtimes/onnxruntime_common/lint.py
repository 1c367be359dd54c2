"""Find nodes of an ONNX graph that ONNX Runtime's CPU kernels compute slowly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.checkpoints.quantized_matrix import BLOCK_SIZES

if TYPE_CHECKING:
    from onnx import NodeProto

FLOAT_TYPES = (1, 10, 11, 16)  # TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16
ZERO_POINTS, GROUP_INDEX = 3, 4  # inputs of com.microsoft::MatMulNBits


def slow_paths(path: Path) -> list[str]:
    """Return one sentence for each kind of node in the ONNX file that is known to run many times slower.

    Specification: onnxruntime ContribOperators.md, MatMulNBits.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    counts = Counter(finding for node in graph.node for finding in _node_findings(node, types))
    if not any(node.op_type == "GroupQueryAttention" for node in graph.node):
        counts["attention is not fused into GroupQueryAttention"] = 1
    # only the factors A and B of adapters are inputs that have a default
    adapted = len(types.keys() & {value.name for value in graph.input}) // 2
    if adapted:
        counts["matrix with an adapter branch computes more for each token, even without an active adapter"] = adapted
    return [f"{count} × {finding}" if count > 1 else finding for finding, count in counts.items()]


def _node_findings(node: NodeProto, types: dict[str, int]) -> list[str]:
    if node.op_type != "MatMulNBits":
        return []
    attributes = {a.name: a.i for a in node.attribute}
    inputs = [*node.input, "", "", "", "", ""]
    findings = []
    if not attributes.get("accuracy_level"):
        findings.append("MatMulNBits without accuracy_level computes in fp32 (4 to 140 times slower)")
    if types.get(inputs[ZERO_POINTS]) in FLOAT_TYPES:
        findings.append("MatMulNBits with float zero-points (85 times slower than uint8)")
    if attributes["block_size"] not in BLOCK_SIZES[attributes["bits"]]:
        findings.append("MatMulNBits of {bits} bits in blocks of {block_size} (50 times slower)".format(**attributes))
    if inputs[GROUP_INDEX]:
        findings.append("MatMulNBits with g_idx (85 times slower than without)")
    return findings
