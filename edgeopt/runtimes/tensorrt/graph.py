"""What TensorRT asks of a graph, looked at before there is a GPU: operators, grids and weights.

Operators: the support matrix of onnx-tensorrt at the release of each version; a list of those that decoders are made
of. Grids: IDequantizeLayer in TensorRT's documentation, which takes none but symmetric ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

Version = tuple[int, int]

_NAMES = """
Abs Add And Cast CastLike Clip Concat Constant ConstantOfShape Cos CumSum DequantizeLinear Div Einsum Equal Erf Exp
Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual Identity IsInf IsNaN
LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pad Pow QuantizeLinear Range
Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign Sin
Size Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_NAMES.split())
"""Supported since 10.0."""
SINCE: Mapping[str, Version] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "Swish": (11, 0),
}
"""Supported from a later version on."""
OPSETS: Mapping[Version, int] = {(10, 0): 21, (10, 15): 23}
"""The newest opset whose operators a version knows, from that version on; blocks of whole numbers came with 21."""


def opset(oldest: Version) -> int:
    """The opset that is exported for a TensorRT of this version and later ones."""
    return max(known for since, known in OPSETS.items() if oldest >= since)


def faults(path: Path, oldest: Version) -> list[str]:
    """Why a TensorRT of version `oldest` would refuse the graph at `path`, a sentence each; empty where it takes it."""
    import onnx

    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return [f"the graph is no valid ONNX ({str(error).splitlines()[0]})"]
    model = onnx.load(path, load_external_data=False)
    return [*_operators(model, oldest), *_grids(model, path), *_weights(model, path)]


def _operators(model: onnx.ModelProto, oldest: Version) -> Iterator[str]:
    asked = sorted({(node.domain, node.op_type) for node in model.graph.node})
    for domain, name in asked:
        since = SINCE.get(name, (10, 0) if name in OPERATORS else None)
        if domain not in ("", "ai.onnx") or since is None:
            yield f"TensorRT has no operator {'.'.join(filter(None, (domain, name)))}"
        elif oldest < since:
            yield f"TensorRT {'.'.join(map(str, oldest))} has no operator {name}, which came with {since[0]}.{since[1]}"


def _grids(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    """Zero-points that are not zero, and scales that are no constants."""
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    signed = (TensorProto.INT8, TensorProto.INT4)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes, scale, *zero_points = node.input
        if scale not in constants:
            yield f"the scale of {node.output[0]} is computed, and TensorRT wants it constant"
        for name in zero_points:
            if name not in constants:
                yield f"the zero-point of {node.output[0]} is computed, and TensorRT wants none"
            elif numpy_helper.to_array(constants[name], str(path.parent)).any():
                yield f"the zero-point of {node.output[0]} is not 0"
        typed = [constants[name].data_type for name in (codes, *zero_points) if name in constants]
        if not typed or any(kind not in signed for kind in typed):
            yield f"the whole numbers of {node.output[0]} are not signed ones of 4 or 8 bits"


def _weights(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    """Weights whose bytes are not those that their shape and type take."""
    import math

    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    sizes: dict[str, int] = {}
    for tensor in filter(uses_external_data, model.graph.initializer):
        info: Any = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if info.location not in sizes:
            sizes[info.location] = file.stat().st_size if file.is_file() else 0
        wanted = -(-math.prod(tensor.dims) * _bits(tensor.data_type) // 8)
        if info.length is not None and info.length != wanted:
            yield f"{tensor.name} has {info.length} bytes, and its shape takes {wanted}"
        if (info.offset or 0) + wanted > sizes[info.location]:
            yield f"{tensor.name} ends behind the end of {info.location}"


def _bits(kind: int) -> int:
    import onnx

    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
