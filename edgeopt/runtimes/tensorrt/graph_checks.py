"""Check an ONNX graph against TensorRT's requirements without a GPU: operators, quantization and weights.

The operator list follows the support matrix of onnx-tensorrt at the release of each TensorRT version, limited to
operators that occur in decoders. The quantization rules follow the documentation of TensorRT's IDequantizeLayer, which
accepts symmetric quantization only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

Version = tuple[int, int]
"""Major and minor version of TensorRT."""

_OPERATOR_NAMES = """
Abs Add And Cast CastLike Clip Concat Constant ConstantOfShape Cos CumSum DequantizeLinear Div Einsum Equal Erf Exp
Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual Identity IsInf IsNaN
LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pad Pow QuantizeLinear Range
Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign Sin
Size Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATOR_NAMES.split())
"""Operators that TensorRT supports since 10.0."""
ADDED_OPERATORS: Mapping[str, Version] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "Swish": (11, 0),
}
"""Operators that a later TensorRT version added, with that version."""
OPSETS: Mapping[Version, int] = {(10, 0): 21, (10, 15): 23}
"""Newest ONNX opset that TensorRT supports from each version on. Opset 21 added blockwise quantization."""


def opset_for(min_version: Version) -> int:
    """Return the newest opset that TensorRT `min_version` and all later versions support."""
    return max(opset for since, opset in OPSETS.items() if min_version >= since)


def find_faults(path: Path, min_version: Version) -> list[str]:
    """Return the reasons why TensorRT `min_version` would reject the ONNX graph at `path`, one sentence each."""
    import onnx

    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return [f"the graph is not valid ONNX ({str(error).splitlines()[0]})"]
    model = onnx.load(path, load_external_data=False)
    return [*_operator_faults(model, min_version), *_quantization_faults(model, path), *_weight_faults(model, path)]


def _operator_faults(model: onnx.ModelProto, min_version: Version) -> Iterator[str]:
    operators = sorted({(node.domain, node.op_type) for node in model.graph.node})
    for domain, name in operators:
        since = ADDED_OPERATORS.get(name, (10, 0) if name in OPERATORS else None)
        if domain not in ("", "ai.onnx") or since is None:
            yield f"TensorRT does not support the operator {'.'.join(filter(None, (domain, name)))}"
        elif min_version < since:
            yield f"TensorRT {_dotted(min_version)} does not support the operator {name}, added in {_dotted(since)}"


def _quantization_faults(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    """Yield a fault for each zero-point that is not zero, scale that is not constant and type that is not signed."""
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    signed_types = (TensorProto.INT8, TensorProto.INT4)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes, scale, *zero_points = node.input
        if scale not in constants:
            yield f"the scale of {node.output[0]} must be constant, but the graph computes it"
        for name in zero_points:
            if name not in constants:
                yield f"the zero-point of {node.output[0]} must be 0, but the graph computes it"
            elif numpy_helper.to_array(constants[name], str(path.parent)).any():
                yield f"the zero-point of {node.output[0]} must be 0"
        constant_types = [constants[name].data_type for name in (codes, *zero_points) if name in constants]
        if not constant_types or any(data_type not in signed_types for data_type in constant_types):
            yield f"the codes of {node.output[0]} must be signed integers of 4 or 8 bits"


def _weight_faults(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    """Yield a fault for each external weight whose byte count does not match its shape and type."""
    import math

    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    file_sizes: dict[str, int] = {}
    for tensor in filter(uses_external_data, model.graph.initializer):
        info: Any = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if info.location not in file_sizes:
            file_sizes[info.location] = file.stat().st_size if file.is_file() else 0
        expected_bytes = -(-math.prod(tensor.dims) * _element_bits(tensor.data_type) // 8)
        if info.length is not None and info.length != expected_bytes:
            yield f"{tensor.name} has {info.length} bytes, its shape needs {expected_bytes}"
        if (info.offset or 0) + expected_bytes > file_sizes[info.location]:
            yield f"{tensor.name} exceeds the end of {info.location}"


def _element_bits(data_type: int) -> int:
    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
