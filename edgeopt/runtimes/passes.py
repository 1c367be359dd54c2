"""Rewrites of a built ONNX graph that onnxruntime-genai's builder does not offer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

EMBEDDING = "model.embed_tokens.weight"


def store_weights_as_half(path: Path) -> None:
    """Keep the fp32 matrices of the model at `path` as fp16, cast back by ORT when it loads them.

    fp16 is a storage type on CPUs, whose kernels for it are slow or absent.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    with _edited(path) as model:
        casts = []
        for tensor in model.graph.initializer:
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
                continue
            name, half = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [f"{name}.fp16"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*casts, *nodes])


def quantize_embedding(path: Path, *, bits: int, block_size: int) -> None:
    """Look an embedding table of its own up by GatherBlockQuantized; the builder leaves it in fp32.

    Specification: onnxruntime ContribOperators.md, GatherBlockQuantized.
    """
    from onnx import helper, numpy_helper

    with _edited(path) as model:
        table = next(t for t in model.graph.initializer if t.name == EMBEDDING)
        packed, scales = round_symmetric(numpy_helper.to_array(table), bits=bits, block_size=block_size)
        table.CopyFrom(numpy_helper.from_array(packed, EMBEDDING))
        model.graph.initializer.append(numpy_helper.from_array(scales, f"{EMBEDDING}.scales"))
        for node in model.graph.node:
            if node.op_type == "Gather" and node.input[0] == EMBEDDING:
                attributes = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
                inputs = [EMBEDDING, node.input[1], f"{EMBEDDING}.scales"]
                node.CopyFrom(
                    helper.make_node(
                        "GatherBlockQuantized",
                        inputs,
                        list(node.output),
                        node.name,
                        domain="com.microsoft",
                        **attributes,
                    )
                )


def round_symmetric(table: np.ndarray, *, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to nearest with one scale a block of a row and the zero-point in the middle of the range.

    Args:
        table: float32, shape (rows, columns), columns a multiple of `block_size`.

    Returns:
        uint8 of shape (rows, columns * bits / 8), low bits first, and float32 scales (rows, blocks).
    """
    import numpy as np

    rows, columns = table.shape
    blocks = table.reshape(rows, columns // block_size, block_size)
    middle = 2 ** (bits - 1)
    scales = np.abs(blocks).max(axis=2) / (middle - 1)
    safe = np.where(scales == 0, 1, scales)[..., None]
    codes = (np.rint(blocks / safe) + middle).astype(np.uint8).reshape(rows, columns)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes, scales.astype(np.float32)


@contextmanager
def _edited(path: Path) -> Iterator[ModelProto]:
    """The model at `path` with its tensors in memory, written back with one external data file."""
    import onnx

    model: Any = onnx.load(path)
    yield model
    data = path.with_name(path.name + ".data")
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
