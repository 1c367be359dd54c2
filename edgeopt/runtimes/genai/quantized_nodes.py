"""Matrices that a checkpoint holds on a grid, as nodes of onnxruntime-genai's builder.

Specification: onnxruntime ContribOperators.md, MatMulNBits, GatherBlockQuantized, DynamicQuantizeMatMul and
MatMulIntegerToFloat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import QuantizationScheme
    from edgeopt.runtimes.genai.runtime import Genai

TABLE = "model.embed_tokens"
HEAD_NODE = "/lm_head/MatMul"
PART_BYTES = 8 * 2**20
"""Larger matrices are split along their rows: ONNX Runtime holds each twice for a moment while it packs it."""


class GridNodes:
    """Writes MatMulNBits and GatherBlockQuantized for what is on a grid, in place of the builder's float nodes."""

    def __init__(self, model: Any, network: Any, checkpoint: Checkpoint, runtime: Genai) -> None:
        self._model, self._spec, self._accuracy_level = model, checkpoint.spec, runtime.accuracy_level
        self._matrices = _by_node(network, checkpoint, fused=runtime.gate_up_fused)
        self._ranges = modeling.input_ranges(checkpoint)
        self._make_float, self._make_lookup = model.make_matmul_float, model.make_embedding_lookup

    def install(self) -> None:
        self._model.make_matmul_float, self._model.make_embedding_lookup = self.matmul, self.lookup

    def matmul(self, float_matrix: Any, name: str, root_input: str, **options: Any) -> str:
        """As the builder's make_matmul_float: the node's name, whose output is `logits` where options say so."""
        if name not in self._matrices:
            made: str = self._make_float(float_matrix, name, root_input, **options)
            return made
        matrix, form = self._matrices[name]
        if form.inputs != "float":
            return self._multiply_integers(name, root_input)
        node, prefix = f"{name}NBits", name[1:].replace("/", ".")
        output = "logits" if options.get("logits") else f"{node}/output_0"
        parts = matrix.split(_parts(len(matrix.codes), PART_BYTES * 8 // (matrix.codes.shape[1] * form.bits)))
        if name == HEAD_NODE and self._spec.tied_embeddings:
            self._multiply(node, form, matrix, root_input, self._tied(node, form, matrix), output)
        elif len(parts) == 1:
            self._multiply(node, form, matrix, root_input, self._store(matrix, form, prefix), output)
        else:
            outputs = [f"{node}/{number}/output_0" for number in range(len(parts))]
            for number, part in enumerate(parts):
                stored = self._store(part, form, f"{prefix}.{number}")
                self._multiply(f"{node}/{number}", form, part, root_input, stored, outputs[number])
            self._model.make_node("Concat", inputs=outputs, outputs=[output], name=f"{node}/Concat", axis=-1)
            self._note(output, len(matrix.codes))
        return node

    def lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:
        """As the builder's make_embedding_lookup: the name of the output."""
        if EMBEDDING not in self._matrices:
            made: str = self._make_lookup(embedding, basename, lm_head)
            return made
        matrix, form = self._matrices[EMBEDDING]
        codes, scales, *zero_points = self._store(matrix, form, TABLE, flat=True)
        name = f"{basename}/GatherBlockQuantized"
        self._model.make_node(
            "GatherBlockQuantized",
            inputs=[codes, self._model.input_names["input_ids"], scales, *zero_points],
            outputs=[f"{name}/output_0"],
            name=name,
            domain="com.microsoft",
            bits=form.bits,
            block_size=form.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return f"{name}/output_0"

    def _multiply(
        self,
        node: str,
        form: QuantizationScheme,
        matrix: QuantizedMatrix,
        root_input: str,
        stored: list[str],
        output: str,
    ) -> None:
        rows, columns = matrix.codes.shape
        self._model.make_node(
            "MatMulNBits",
            inputs=[root_input, *stored],
            outputs=[output],
            name=node,
            domain="com.microsoft",
            accuracy_level=self._accuracy_level,
            bits=form.bits,
            block_size=form.block_size,
            K=columns,
            N=rows,
        )
        self._note(output, rows)

    def _multiply_integers(self, name: str, root_input: str) -> str:
        """8-bit inputs times 8-bit weights; weights are unsigned, as signed ones saturate on CPUs without VNNI."""
        import numpy as np

        model, (matrix, form), prefix, node = (
            self._model,
            self._matrices[name],
            name[1:].replace("/", "."),
            f"{name}Integer",
        )
        rows = len(matrix.codes)
        tensors = {
            "codes": np.ascontiguousarray(matrix.codes.numpy().T),
            "scales": matrix.scales.numpy().reshape(rows),
            "zero_points": matrix.zero_points.numpy().reshape(rows),
        }
        for key, tensor in tensors.items():
            model.make_initializer(tensor, f"{prefix}.{key}")
        codes, scales, zero_points = (f"{prefix}.{key}" for key in tensors)
        if form.inputs == "dynamic":
            operator, inputs = "DynamicQuantizeMatMul", [root_input, codes, scales, zero_points]
        else:
            found, scale, zero_point = self._quantized(name, root_input)
            operator, inputs = "MatMulIntegerToFloat", [found, codes, scale, scales, zero_point, zero_points]
        output = f"{node}/output_0"
        model.make_node(operator, inputs=inputs, outputs=[output], name=node, domain="com.microsoft")
        self._note(output, rows)
        return node

    def _quantized(self, name: str, root_input: str) -> list[str]:
        """Inputs in 8 bits with their scale and zero-point; matrices that read the same input share the node."""
        import numpy as np

        scale, zero_point = self._ranges[_unit(name)]
        node, stored = f"{root_input}/Quantize", root_input.strip("/").replace("/", ".")
        names = [f"{node}/output_0", f"{stored}.scale", f"{stored}.zero_point"]
        if node not in self._model.node_names:
            self._model.make_initializer(np.array(scale, np.float32), names[1])
            self._model.make_initializer(np.array(zero_point, np.uint8), names[2])
        self._model.make_node("QuantizeLinear", inputs=[root_input, *names[1:]], outputs=names[:1], name=node)
        return names

    def _note(self, output: str, width: int) -> None:
        model = self._model
        model.make_value(output, model.io_dtype, shape=model.make_hidden_state_shape(last_dim=width))

    def _tied(self, node: str, form: QuantizationScheme, matrix: QuantizedMatrix) -> list[str]:
        """The embedding's stored matrix in the shape that lm_head reads."""
        import onnx_ir as ir

        codes, *others = _names(TABLE, form)
        shape = _shape(matrix, form)
        self._model.make_reshape(f"{node}/codes", [codes, f"/model/constants/INT64/{shape}"], ir.DataType.UINT8, shape)
        return [f"{node}/codes/output_0", *others]

    def _store(
        self, matrix: QuantizedMatrix, form: QuantizationScheme, prefix: str, *, flat: bool = False
    ) -> list[str]:
        """Initializers of a matrix: packed codes, fp16 scales that are widened at load, packed zero-points."""
        import numpy as np
        import onnx_ir as ir

        codes, scales, *zero_points = _names(prefix, form)
        shape = _shape(matrix, form)
        packed = quantized_matrix.pack(matrix.codes, form.bits)
        self._model.make_initializer(packed if flat else packed.reshape(shape), codes)
        half = matrix.scales.numpy().astype(np.float16)
        self._model.make_initializer(half, f"{prefix}.scales")
        self._model.make_cast(f"{prefix}.scales/Cast", f"{prefix}.scales", ir.DataType.FLOAT, shape=list(half.shape))
        for name in zero_points:
            self._model.make_initializer(quantized_matrix.pack(matrix.zero_points, form.bits), name)
        return [codes, scales, *zero_points]


def _shape(matrix: QuantizedMatrix, form: QuantizationScheme) -> list[int]:
    """(rows, blocks, bytes of a block), as MatMulNBits reads it."""
    rows, columns = matrix.codes.shape
    return [rows, columns // form.block_size, form.block_size * form.bits // 8]


def _by_node(
    network: Any, checkpoint: Checkpoint, *, fused: bool
) -> dict[str, tuple[QuantizedMatrix, QuantizationScheme]]:
    """Matrices by the name that the builder gives their node; the embedding by that of its unit."""
    spec, modules = checkpoint.spec, modeling.units(network)
    rounded = quantized_matrix.rounded(safetensors_io.read_folder(checkpoint.directory))
    if spec.tied_embeddings and EMBEDDING in spec.schemes:
        rounded[modules[LM_HEAD][0]] = rounded[modules[EMBEDDING][0]]
    found: dict[str, tuple[QuantizedMatrix, QuantizationScheme]] = {}
    for unit, form in spec.schemes.items():
        whole = quantized_matrix.stack(rounded[name] for name in modules[unit])
        parts = nodes(unit, len(whole.codes), fused=fused)
        matrices = whole.split(list(parts.values()))
        found |= {name: (matrix, form) for name, matrix in zip(parts, matrices, strict=True)}
    return found


def nodes(unit: str, rows: int, *, fused: bool = False) -> dict[str, int]:
    """The nodes that the builder makes of a unit, from its first row to its last, with the rows of each.

    With `fused` gate and up are one.
    """
    if unit in (LM_HEAD, EMBEDDING):
        return {HEAD_NODE if unit == LM_HEAD else EMBEDDING: rows}
    _, layer, kind = unit.split(".")
    base = f"/model/layers.{layer}"
    if kind == "gate_up" and not fused:
        return dict.fromkeys((f"{base}/mlp/gate_proj/MatMul", f"{base}/mlp/up_proj/MatMul"), rows // 2)
    return {f"{base}/{'mlp' if kind in ('gate_up', 'down') else 'attn'}/{kind}_proj/MatMul": rows}


def _unit(node: str) -> str:
    """The unit that a layer's node belongs to."""
    _, _, layer, _, projection, _ = node.split("/")
    kind = projection.removesuffix("_proj")
    return f"{layer}.{'gate_up' if kind in ('gate', 'up') else kind}"


def _parts(rows: int, most: int) -> list[int]:
    """`rows` in nearly equal parts of at most `most`, multiples of 16 but for the last."""
    count = -(-rows // most)
    size = -(-rows // (16 * count)) * 16
    return [min(size, rows - start) for start in range(0, rows, size)]


def _names(prefix: str, form: QuantizationScheme) -> list[str]:
    """Codes, scales and, where a grid has them, zero-points as inputs of a node."""
    names = [f"{prefix}.codes", f"{prefix}.scales/Cast/output_0"]
    return names if form.symmetric else [*names, f"{prefix}.zero_points"]
