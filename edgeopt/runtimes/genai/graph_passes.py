"""Rewrites of a built ONNX graph that onnxruntime-genai's builder does not offer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LM_HEAD = "/lm_head/MatMul"
LAST_ROW = "/lm_head/last_row"


def store_weights_as_half(path: Path) -> None:
    """Keep the fp32 matrices of the model at `path` as fp16, cast back by ORT when it loads them.

    fp16 is a storage type on CPUs, whose kernels for it are slow or absent.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    with _edited(path) as model:
        casts, inputs = [], {value.name for value in model.graph.input}
        for tensor in model.graph.initializer:
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or tensor.name in inputs:
                continue
            name, half = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [f"{name}.fp16"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*casts, *nodes])


def split_scoring(path: Path, scoring: Path) -> None:
    """Keep the graph at `path`, which writes logits of every token, as `scoring`; `path` then writes the last token's.

    Both read the same external data. Generation needs one row of logits after a prompt: the lm_head of
    all others would cost time and memory in proportion to prompt and vocabulary.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    shutil.copyfile(path, scoring)
    model: Any = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    hidden = next(n for n in nodes if n.name.startswith(LM_HEAD) and n.op_type.startswith("MatMul")).input[0]
    first = next(n for n in nodes if hidden in n.input)
    bounds = {"starts": [-1], "ends": [np.iinfo(np.int64).max], "axes": [1]}
    inputs = [f"{LAST_ROW}/{name}" for name in bounds]
    for name, value in zip(inputs, bounds.values(), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), name))
    last = helper.make_node("Slice", [hidden, *inputs], [f"{LAST_ROW}/output_0"], name=LAST_ROW)
    for node in nodes:
        if node.name.startswith(LM_HEAD) and node.input[:1] == [hidden]:
            node.input[0] = last.output[0]
    model.graph.node.insert(nodes.index(first), last)
    (logits,) = (o for o in model.graph.output if o.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    _forget_shapes(model, first)
    onnx.save(model, path)


def _forget_shapes(model: ModelProto, first: NodeProto) -> None:
    """Drop the recorded shapes of what is computed after the last token was chosen."""
    names = {name for node in list(model.graph.node)[list(model.graph.node).index(first) :] for name in node.output}
    kept = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


@contextmanager
def _edited(path: Path) -> Iterator[ModelProto]:
    """The model at `path` with its tensors in memory, written back with one external data file."""
    import onnx

    model: Any = onnx.load(path)
    yield model
    data = path.with_name(path.name + ".data")
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
