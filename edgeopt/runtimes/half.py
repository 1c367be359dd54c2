"""fp16 as a storage type on CPUs, whose kernels for it are slow or absent: cast to fp32 when loaded."""

from __future__ import annotations

from pathlib import Path


def store_weights_as_half(path: Path) -> None:
    """Rewrite the fp32 matrices of the ONNX model at `path` as fp16 with a Cast, which ORT folds at load."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    data = path.with_name(path.name + ".data")
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        name = tensor.name
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.fp16"))
        casts.append(helper.make_node("Cast", [f"{name}.fp16"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
