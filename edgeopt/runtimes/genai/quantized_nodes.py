"""Write the quantized matrices of a checkpoint as nodes of onnxruntime-genai's builder.

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

EMBEDDING_PREFIX = "model.embed_tokens"
LM_HEAD_NODE = "/lm_head/MatMul"
MAX_NODE_BYTES = 8 * 2**20
"""Larger matrices are split along their rows, because ONNX Runtime holds two copies of each while it packs it."""


class QuantizedNodes:
    """Write MatMulNBits and GatherBlockQuantized instead of the builder's float nodes for quantized matrices."""

    def __init__(self, model: Any, network: Any, checkpoint: Checkpoint, runtime: Genai) -> None:
        self._model, self._spec, self._accuracy_level = model, checkpoint.spec, runtime.accuracy_level
        self._matrices = _matrices_by_node(network, checkpoint, fused=runtime.gate_up_fused)
        self._input_ranges = modeling.input_ranges(checkpoint)
        self._make_float, self._make_float_lookup = model.make_matmul_float, model.make_embedding_lookup

    def install(self) -> None:
        """Replace the builder's methods."""
        self._model.make_matmul_float, self._model.make_embedding_lookup = self.make_matmul, self.make_lookup

    def make_matmul(self, float_matrix: Any, name: str, root_input: str, **options: Any) -> str:
        """Implement the builder's make_matmul_float: return the node's name.

        The output is called `logits` if `options` ask for it.
        """
        if name not in self._matrices:
            float_node: str = self._make_float(float_matrix, name, root_input, **options)
            return float_node
        matrix, scheme = self._matrices[name]
        if scheme.inputs != "float":
            return self._make_integer_matmul(name, root_input)
        node, prefix = f"{name}NBits", name[1:].replace("/", ".")
        output = "logits" if options.get("logits") else f"{node}/output_0"
        rows, columns = matrix.codes.shape
        parts = matrix.split(_split_rows(rows, MAX_NODE_BYTES * 8 // (columns * scheme.bits)))
        if name == LM_HEAD_NODE and self._spec.tied_embeddings:
            weights = self._reshape_embedding(node, scheme, matrix)
            self._make_matmul_nbits(node, scheme, matrix, root_input, weights, output)
        elif len(parts) == 1:
            self._make_matmul_nbits(node, scheme, matrix, root_input, self._store(matrix, scheme, prefix), output)
        else:
            outputs = [f"{node}/{number}/output_0" for number in range(len(parts))]
            for number, part in enumerate(parts):
                weights = self._store(part, scheme, f"{prefix}.{number}")
                self._make_matmul_nbits(f"{node}/{number}", scheme, part, root_input, weights, outputs[number])
            self._model.make_node("Concat", inputs=outputs, outputs=[output], name=f"{node}/Concat", axis=-1)
            self._declare_output(output, rows)
        return node

    def make_lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:
        """Implement the builder's make_embedding_lookup: return the name of the output."""
        if EMBEDDING not in self._matrices:
            float_output: str = self._make_float_lookup(embedding, basename, lm_head)
            return float_output
        matrix, scheme = self._matrices[EMBEDDING]
        codes, scales, *zero_points = self._store(matrix, scheme, EMBEDDING_PREFIX, flat=True)
        name = f"{basename}/GatherBlockQuantized"
        self._model.make_node(
            "GatherBlockQuantized",
            inputs=[codes, self._model.input_names["input_ids"], scales, *zero_points],
            outputs=[f"{name}/output_0"],
            name=name,
            domain="com.microsoft",
            bits=scheme.bits,
            block_size=scheme.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return f"{name}/output_0"

    def _make_matmul_nbits(
        self,
        node: str,
        scheme: QuantizationScheme,
        matrix: QuantizedMatrix,
        root_input: str,
        weights: list[str],
        output: str,
    ) -> None:
        rows, columns = matrix.codes.shape
        self._model.make_node(
            "MatMulNBits",
            inputs=[root_input, *weights],
            outputs=[output],
            name=node,
            domain="com.microsoft",
            accuracy_level=self._accuracy_level,
            bits=scheme.bits,
            block_size=scheme.block_size,
            K=columns,
            N=rows,
        )
        self._declare_output(output, rows)

    def _make_integer_matmul(self, name: str, root_input: str) -> str:
        """Multiply 8-bit inputs by 8-bit weights, unsigned because signed ones saturate on CPUs without VNNI."""
        import numpy as np

        model, (matrix, scheme) = self._model, self._matrices[name]
        prefix, node = name[1:].replace("/", "."), f"{name}Integer"
        rows = len(matrix.codes)
        tensors = {
            "codes": np.ascontiguousarray(matrix.codes.numpy().T),
            "scales": matrix.scales.numpy().reshape(rows),
            "zero_points": matrix.zero_points.numpy().reshape(rows),
        }
        for key, tensor in tensors.items():
            model.make_initializer(tensor, f"{prefix}.{key}")
        codes, scales, zero_points = (f"{prefix}.{key}" for key in tensors)
        if scheme.inputs == "dynamic":
            operator, inputs = "DynamicQuantizeMatMul", [root_input, codes, scales, zero_points]
        else:
            quantized, scale, zero_point = self._quantize_input(name, root_input)
            operator, inputs = "MatMulIntegerToFloat", [quantized, codes, scale, scales, zero_point, zero_points]
        output = f"{node}/output_0"
        model.make_node(operator, inputs=inputs, outputs=[output], name=node, domain="com.microsoft")
        self._declare_output(output, rows)
        return node

    def _quantize_input(self, name: str, root_input: str) -> list[str]:
        """Return the names of the 8-bit input, its scale and zero-point; matrices with one input share the node."""
        import numpy as np

        scale, zero_point = self._input_ranges[_unit_of_node(name)]
        node, prefix = f"{root_input}/Quantize", root_input.strip("/").replace("/", ".")
        names = [f"{node}/output_0", f"{prefix}.scale", f"{prefix}.zero_point"]
        if node not in self._model.node_names:
            self._model.make_initializer(np.array(scale, np.float32), names[1])
            self._model.make_initializer(np.array(zero_point, np.uint8), names[2])
        self._model.make_node("QuantizeLinear", inputs=[root_input, *names[1:]], outputs=names[:1], name=node)
        return names

    def _declare_output(self, output: str, width: int) -> None:
        model = self._model
        model.make_value(output, model.io_dtype, shape=model.make_hidden_state_shape(last_dim=width))

    def _reshape_embedding(self, node: str, scheme: QuantizationScheme, matrix: QuantizedMatrix) -> list[str]:
        """Reshape the stored embedding for the tied lm_head; return the inputs of its node."""
        import onnx_ir as ir

        codes, *others = _input_names(EMBEDDING_PREFIX, scheme)
        shape = _packed_shape(matrix, scheme)
        self._model.make_reshape(f"{node}/codes", [codes, f"/model/constants/INT64/{shape}"], ir.DataType.UINT8, shape)
        return [f"{node}/codes/output_0", *others]

    def _store(
        self, matrix: QuantizedMatrix, scheme: QuantizationScheme, prefix: str, *, flat: bool = False
    ) -> list[str]:
        """Store a matrix and return the inputs of its node.

        Initializers are packed codes, fp16 scales with a Cast that is folded on loading, and packed zero-points.
        """
        import numpy as np
        import onnx_ir as ir

        codes, scales, *zero_points = _input_names(prefix, scheme)
        shape = _packed_shape(matrix, scheme)
        packed = quantized_matrix.pack(matrix.codes, scheme.bits)
        self._model.make_initializer(packed if flat else packed.reshape(shape), codes)
        scales_fp16 = matrix.scales.numpy().astype(np.float16)
        self._model.make_initializer(scales_fp16, f"{prefix}.scales")
        self._model.make_cast(
            f"{prefix}.scales/Cast", f"{prefix}.scales", ir.DataType.FLOAT, shape=list(scales_fp16.shape)
        )
        for name in zero_points:
            self._model.make_initializer(quantized_matrix.pack(matrix.zero_points, scheme.bits), name)
        return [codes, scales, *zero_points]


def _packed_shape(matrix: QuantizedMatrix, scheme: QuantizationScheme) -> list[int]:
    """Return the shape that MatMulNBits expects: (rows, blocks per row, bytes per block)."""
    rows, columns = matrix.codes.shape
    return [rows, columns // scheme.block_size, scheme.block_size * scheme.bits // 8]


def _matrices_by_node(
    network: Any, checkpoint: Checkpoint, *, fused: bool
) -> dict[str, tuple[QuantizedMatrix, QuantizationScheme]]:
    """Return matrix and scheme by the name of the builder's node, or by `embedding` for the embedding."""
    spec, modules = checkpoint.spec, modeling.unit_modules(network)
    quantized = quantized_matrix.quantized_matrices(safetensors_io.read_folder(checkpoint.directory))
    if spec.tied_embeddings and EMBEDDING in spec.schemes:
        quantized[modules[LM_HEAD][0]] = quantized[modules[EMBEDDING][0]]
    by_node: dict[str, tuple[QuantizedMatrix, QuantizationScheme]] = {}
    for unit, scheme in spec.schemes.items():
        stacked = quantized_matrix.stack(quantized[name] for name in modules[unit])
        rows_by_node = node_rows(unit, len(stacked.codes), fused=fused)
        matrices = stacked.split(list(rows_by_node.values()))
        by_node |= {name: (matrix, scheme) for name, matrix in zip(rows_by_node, matrices, strict=True)}
    return by_node


def node_rows(unit: str, rows: int, *, fused: bool = False) -> dict[str, int]:
    """Return the builder's nodes of a unit with the row count of each, in the order of the rows.

    With `fused`, gate and up share one node.
    """
    if unit in (LM_HEAD, EMBEDDING):
        return {LM_HEAD_NODE if unit == LM_HEAD else EMBEDDING: rows}
    _, layer, kind = unit.split(".")
    base = f"/model/layers.{layer}"
    if kind == "gate_up" and not fused:
        return dict.fromkeys((f"{base}/mlp/gate_proj/MatMul", f"{base}/mlp/up_proj/MatMul"), rows // 2)
    return {f"{base}/{'mlp' if kind in ('gate_up', 'down') else 'attn'}/{kind}_proj/MatMul": rows}


def _unit_of_node(node: str) -> str:
    """Return the unit of a layer's node."""
    _, _, layer, _, projection, _ = node.split("/")
    kind = projection.removesuffix("_proj")
    return f"{layer}.{'gate_up' if kind in ('gate', 'up') else kind}"


def _split_rows(rows: int, max_rows: int) -> list[int]:
    """Split `rows` into nearly equal parts of at most `max_rows`. All but the last are multiples of 16."""
    count = -(-rows // max_rows)
    size = -(-rows // (16 * count)) * 16
    return [min(size, rows - start) for start in range(0, rows, size)]


def _input_names(prefix: str, scheme: QuantizationScheme) -> list[str]:
    """Return the names of codes, scales and, if the scheme has them, zero-points as inputs of a node."""
    names = [f"{prefix}.codes", f"{prefix}.scales/Cast/output_0"]
    return names if scheme.symmetric else [*names, f"{prefix}.zero_points"]
