"""Insert quantized matrices into an exported graph as QuantizeLinear and DequantizeLinear nodes (QDQ).

QDQ uses only operators of the ONNX standard. Runtimes with integer kernels fuse these nodes into their kernels.
Specification: https://onnx.ai/onnx/operators, DequantizeLinear and QuantizeLinear from opset 21 on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import QuantizationScheme

_SIGNED: Mapping[int, Any] = {4: ml_dtypes.int4, 8: np.int8}
_UNSIGNED: Mapping[int, Any] = {4: ml_dtypes.uint4, 8: np.uint8}


def max_magnitude(scale: float, zero_point: int) -> float:
    """Return the largest magnitude that uint8 codes with this scale and zero-point represent."""
    return scale * max(zero_point, 255 - zero_point)


def hide_weights(model: ir.Model, names: Iterable[str]) -> None:
    """Turn the named initializers into graph inputs, so that the optimizer does not fold them into constants.

    `QdqNodes.insert` replaces these inputs and removes them.
    """
    for name in names:
        weight = model.graph.initializers.pop(name, None)
        if weight is not None:  # a tied weight has one initializer and two names
            weight.const_value = None
            model.graph.inputs.append(weight)


class QdqNodes:
    """Replace the weights that `hide_weights` turned into inputs with quantized matrices.

    Args:
        weight_names: name of each module's weight in the graph.
        fp16_units: units that multiply in fp16.
        signed_inputs: quantize activations with static ranges to int8 with zero-point 0 instead of uint8.
    """

    def __init__(
        self,
        model: ir.Model,
        checkpoint: Checkpoint,
        weight_names: Mapping[str, str],
        *,
        fp16_units: Collection[str] = (),
        signed_inputs: bool = False,
    ) -> None:
        self._graph, self._spec, self._weight_names = model.graph, checkpoint.spec, weight_names
        self._fp16_units, self._signed_inputs = fp16_units, signed_inputs
        self._matrices = quantized_matrix.quantized_matrices(safetensors_io.read_folder(checkpoint.directory))
        self._input_ranges = modeling.input_ranges(checkpoint)
        self._quantized_inputs: dict[tuple[str, str], list[ir.Value]] = {}

    def insert(self, units: Mapping[str, Sequence[str]]) -> None:
        """Replace the weights of all quantized units. `units` maps each unit to its modules."""
        for unit, scheme in self._spec.schemes.items():
            for module in units[unit]:
                tied = self._spec.tied_embeddings and unit in (LM_HEAD, EMBEDDING)
                modules = [units[table][0] for table in (EMBEDDING, LM_HEAD)] if tied else [module]
                for node in [usage.node for usage in self._weight(modules).uses()]:
                    if node.op_type == "Gather" and unit == EMBEDDING:
                        self._replace_embedding(node, module, self._matrices[modules[0]], scheme)
                    elif node.op_type == "Transpose" and unit != EMBEDDING:
                        self._replace_products(node, unit, module, self._matrices[modules[0]], scheme)
        for value in [value for value in self._graph.inputs if value.name in self._weight_names.values()]:
            self._graph.inputs.remove(value)
        self._graph.sort()

    def _weight(self, modules: Iterable[str]) -> ir.Value:
        """Return the weight of the first module that has one. Tied modules share a single weight."""
        inputs = {value.name: value for value in self._graph.inputs}
        return next(inputs[name] for name in map(self._weight_names.__getitem__, modules) if name in inputs)

    def _replace_products(
        self, transpose: ir.Node, unit: str, module: str, matrix: QuantizedMatrix, scheme: QuantizationScheme
    ) -> None:
        """Replace the float weight in every product with the output of `transpose`, (in_features, out_features)."""
        products = [usage.node for usage in transpose.outputs[0].uses()]
        if scheme.inputs == "float":
            weight = self._dequantize_weight(transpose, unit, module, matrix, scheme)
            for product in products:
                product.replace_input_with(1, weight)
        elif scheme.inputs == "static":
            weight = self._dequantize_weight(transpose, unit, module, matrix, scheme)
            for product in products:
                product.replace_input_with(0, self._quantize_static_input(product, unit))
                product.replace_input_with(1, weight)
        else:
            for product in products:
                self._multiply_integers(product, module, matrix)
        self._graph.remove(transpose, safe=True)

    def _dequantize_weight(
        self, before: ir.Node, unit: str, module: str, matrix: QuantizedMatrix, scheme: QuantizationScheme
    ) -> ir.Value:
        """Return the dequantized weight, shape (in_features, out_features).

        The scales of blocks are stored in fp16. For a unit in fp32, a Cast converts them when the graph is loaded.
        """
        blocked = scheme.inputs == "float"
        codes, zero_points = _typed_codes(matrix, scheme, signed=blocked or self._signed_inputs)
        scale_array = matrix.scales.numpy().T if blocked else matrix.scales.numpy().T[0]
        scales = (
            self._store_fp16_cast_to_fp32(before, f"{module}.scales", scale_array)
            if blocked and unit not in self._fp16_units
            else self._store(f"{module}.scales", scale_array.astype(self._float_type(unit)))
        )
        inputs = [self._store(f"{module}.codes", codes.T), scales]
        if zero_points is not None:
            inputs.append(self._store(f"{module}.zero_points", zero_points.T if blocked else zero_points.T[0]))
        granularity = {"axis": 0, "block_size": scheme.block_size} if blocked else {"axis": 1}
        return self._insert_node(before, "DequantizeLinear", inputs, f"{module}.weight", **granularity)

    def _quantize_static_input(self, product: ir.Node, unit: str) -> ir.Value:
        """Return the product's input after a QuantizeLinear and DequantizeLinear pair.

        Products with the same input share one pair.
        """
        activation = product.inputs[0]
        assert activation is not None
        key = str(activation.name), "static"
        if key not in self._quantized_inputs:
            scale, zero_point = self._input_ranges[unit]
            zero_point_array = np.array(zero_point, np.uint8)
            if self._signed_inputs:
                scale, zero_point_array = max_magnitude(scale, zero_point) / 127, np.array(0, np.int8)
            parameters = [
                self._store(f"{unit}.input.scale", np.array(scale, self._float_type(unit))),
                self._store(f"{unit}.input.zero_point", zero_point_array),
            ]
            codes = self._insert_node(product, "QuantizeLinear", [activation, *parameters], f"{unit}.input.codes")
            dequantized = self._insert_node(product, "DequantizeLinear", [codes, *parameters], f"{unit}.input")
            self._quantized_inputs[key] = [dequantized]
        return self._quantized_inputs[key][0]

    def _multiply_integers(self, product: ir.Node, module: str, matrix: QuantizedMatrix) -> None:
        """Replace the product with MatMulInteger of dynamically quantized inputs and weights with per-row scales."""
        activation = product.inputs[0]
        assert activation is not None
        key = str(activation.name), "dynamic"
        if key not in self._quantized_inputs:
            quantize = ir.node("DynamicQuantizeLinear", [activation], num_outputs=3, name=f"{activation.name}.quantize")
            for value, part in zip(quantize.outputs, ("codes", "scale", "zero_point"), strict=True):
                value.name = f"{activation.name}.{part}"
            self._graph.insert_before(product, [quantize])
            self._quantized_inputs[key] = list(quantize.outputs)
        codes, scale, zero_point = self._quantized_inputs[key]
        weight = self._store(f"{module}.codes", np.ascontiguousarray(matrix.codes.numpy().T))
        zero_points = self._store(f"{module}.zero_points", matrix.zero_points.numpy().reshape(-1))
        scales = self._store(f"{module}.scales", matrix.scales.numpy().reshape(-1).astype(np.float32))
        integers = self._insert_node(
            product, "MatMulInteger", [codes, weight, zero_point, zero_points], f"{module}.integers"
        )
        sums = self._insert_node(product, "Cast", [integers], f"{module}.sums", to=ir.DataType.FLOAT)
        factors = self._insert_node(product, "Mul", [scale, scales], f"{module}.factors")
        result = self._insert_node(product, "Mul", [sums, factors], f"{module}.product")
        ir.convenience.replace_all_uses_with(product.outputs[0], result)
        self._graph.remove(product, safe=True)

    def _replace_embedding(
        self, gather: ir.Node, module: str, matrix: QuantizedMatrix, scheme: QuantizationScheme
    ) -> None:
        """Replace the lookup with one that dequantizes only the selected rows: (code - zero_point) * scale."""
        tokens = gather.inputs[1]
        assert tokens is not None
        packed = self._store(f"{module}.codes", quantized_matrix.pack(matrix.codes, scheme.bits))
        codes = self._insert_node(gather, "Gather", [packed, tokens], f"{module}.rows", axis=0)
        if scheme.bits == 4:
            mask = self._store(f"{module}.mask", np.array(15, np.uint8))
            shift = self._store(f"{module}.shift", np.array(4, np.uint8))
            halves = [
                self._insert_node(gather, "BitwiseAnd", [codes, mask], f"{module}.low"),
                self._insert_node(gather, "BitShift", [codes, shift], f"{module}.high", direction="RIGHT"),
            ]
            last_axis = self._store(f"{module}.last", np.array([-1]))
            columns = [
                self._insert_node(gather, "Unsqueeze", [half, last_axis], f"{half.name}.apart") for half in halves
            ]
            codes = self._insert_node(gather, "Concat", columns, f"{module}.pairs", axis=-1)
        hidden_size, blocks = matrix.codes.shape[1], matrix.scales.shape[1]
        block_shape = self._store(f"{module}.in_blocks", np.array([0, 0, blocks, hidden_size // blocks]))
        row_shape = self._store(f"{module}.whole", np.array([0, 0, hidden_size]))
        codes = self._insert_node(gather, "Reshape", [codes, block_shape], f"{module}.blocks")
        codes = self._insert_node(gather, "Cast", [codes], f"{module}.numbers", to=ir.DataType.FLOAT)
        zero_points = self._gather_block_parameters(gather, module, "zero_points", matrix.zero_points.numpy(), tokens)
        scales = self._gather_block_parameters(
            gather, module, "scales", matrix.scales.numpy().astype(np.float16), tokens
        )
        centered = self._insert_node(gather, "Sub", [codes, zero_points], f"{module}.centred")
        scaled = self._insert_node(gather, "Mul", [centered, scales], f"{module}.scaled")
        rows = self._insert_node(gather, "Reshape", [scaled, row_shape], f"{module}.found")
        ir.convenience.replace_all_uses_with(gather.outputs[0], rows)
        self._graph.remove(gather, safe=True)

    def _gather_block_parameters(
        self, gather: ir.Node, module: str, part: str, table: np.ndarray, tokens: ir.Value
    ) -> ir.Value:
        """Return the scales or zero-points of the selected rows in fp32, shape (batch, tokens, blocks, 1)."""
        stored, last_axis = self._store(f"{module}.{part}", table), self._store(f"{module}.last", np.array([-1]))
        rows = self._insert_node(gather, "Gather", [stored, tokens], f"{module}.{part}.rows", axis=0)
        cast = self._insert_node(gather, "Cast", [rows], f"{module}.{part}.widened", to=ir.DataType.FLOAT)
        return self._insert_node(gather, "Unsqueeze", [cast, last_axis], f"{module}.{part}.apart")

    def _store_fp16_cast_to_fp32(self, before: ir.Node, name: str, values: np.ndarray) -> ir.Value:
        """Store values that are exact in fp16 as fp16 and return them in fp32."""
        stored = self._store(name, values.astype(np.float16))
        return self._insert_node(before, "Cast", [stored], f"{name}.widened", to=ir.DataType.FLOAT)

    def _float_type(self, unit: str) -> type[np.floating[Any]]:
        """Return the floating-point type in which the unit multiplies."""
        return np.float16 if unit in self._fp16_units else np.float32

    def _store(self, name: str, array: np.ndarray) -> ir.Value:
        """Return the initializer `name`, which holds `array`."""
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            self._graph.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._graph.initializers[name]

    def _insert_node(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value], output: str, **attributes: Any
    ) -> ir.Value:
        """Insert a node before another one and return its only output, which is named `output`."""
        node = ir.node(op_type, inputs, attributes, name=output)
        node.outputs[0].name = output
        self._graph.insert_before(before, [node])
        return node.outputs[0]


def _typed_codes(
    matrix: QuantizedMatrix, scheme: QuantizationScheme, *, signed: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return codes and zero-points with one row per output feature, in the types of ONNX.

    Symmetric schemes become signed without zero-points if `signed` is true. Otherwise they stay unsigned, because
    products of signed weights and unsigned inputs saturate on CPUs without VNNI.
    """
    codes, zero_points = matrix.codes.numpy(), matrix.zero_points.numpy()
    if scheme.symmetric and signed:
        offset = 2 ** (scheme.bits - 1)
        return (codes.astype(np.int16) - offset).astype(np.int8).astype(_SIGNED[scheme.bits]), None
    dtype = _UNSIGNED[scheme.bits]
    return codes.astype(dtype), zero_points.astype(dtype)
