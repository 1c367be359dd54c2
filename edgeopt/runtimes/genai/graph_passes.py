"""Rewrite built ONNX graphs in ways that onnxruntime-genai's builder does not offer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LM_HEAD = "/lm_head/MatMul"
LAST_POSITION = "/lm_head/last_row"


def store_weights_as_fp16(path: Path) -> None:
    """Store the fp32 matrices of the model at `path` as fp16, with a Cast that ONNX Runtime folds when it loads them.

    Computation stays in fp32, because CPU kernels for fp16 are slow or absent.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    with _edited(path) as model:
        casts, inputs = [], {value.name for value in model.graph.input}
        for tensor in model.graph.initializer:
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or tensor.name in inputs:
                continue
            name, fp16 = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(fp16, f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [f"{name}.fp16"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*casts, *nodes])


def split_scoring(path: Path, scoring: Path) -> None:
    """Copy the graph at `path` to `scoring`, and reduce the one at `path` to the logits of the last token.

    Both read the same external data. Generation needs only the last logits of a prompt. The logits of all tokens would
    cost time and memory in proportion to prompt length times vocabulary size.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    shutil.copyfile(path, scoring)
    model: Any = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    hidden = next(n for n in nodes if n.name.startswith(LM_HEAD) and n.op_type.startswith("MatMul")).input[0]
    first_consumer = next(n for n in nodes if hidden in n.input)
    bounds = {"starts": [-1], "ends": [np.iinfo(np.int64).max], "axes": [1]}
    inputs = [f"{LAST_POSITION}/{name}" for name in bounds]
    for name, value in zip(inputs, bounds.values(), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), name))
    last = helper.make_node("Slice", [hidden, *inputs], [f"{LAST_POSITION}/output_0"], name=LAST_POSITION)
    for node in nodes:
        if node.name.startswith(LM_HEAD) and node.input[:1] == [hidden]:
            node.input[0] = last.output[0]
    model.graph.node.insert(nodes.index(first_consumer), last)
    (logits,) = (o for o in model.graph.output if o.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    _drop_shapes_after(model, first_consumer)
    onnx.save(model, path)


def _drop_shapes_after(model: ModelProto, node: NodeProto) -> None:
    """Drop the recorded shapes of all values computed from `node` on."""
    nodes = list(model.graph.node)
    outdated = {name for later in nodes[nodes.index(node) :] for name in later.output}
    valid = [info for info in model.graph.value_info if info.name not in outdated]
    del model.graph.value_info[:]
    model.graph.value_info.extend(valid)


@contextmanager
def _edited(path: Path) -> Iterator[ModelProto]:
    """Load the model at `path` with its tensors, and write it back with one external data file on exit."""
    import onnx

    model: Any = onnx.load(path)
    yield model
    data = path.with_name(path.name + ".data")
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
