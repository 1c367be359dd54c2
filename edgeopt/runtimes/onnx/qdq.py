"""Matrices that a checkpoint holds on a grid, as pairs of quantizing and dequantizing operators (QDQ).

They are of the ONNX standard alone, and every runtime that has kernels for whole numbers fuses them into those.
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
    """The largest magnitude that unsigned 8 bits hold."""
    return scale * max(zero_point, 255 - zero_point)


def hide_weights(model: ir.Model, names: Iterable[str]) -> None:
    """Make weights that are to be replaced inputs of the graph meanwhile, so that no optimizer computes with them."""
    for name in names:
        weight = model.graph.initializers.pop(name, None)
        if weight is not None:  # else it is tied to one that is hidden already
            weight.const_value = None
            model.graph.inputs.append(weight)


class QdqNodes:
    """Puts what is on a grid into an exported graph, in place of the weights that `hide_weights` made inputs.

    Args:
        names: what the graph calls the weight of each module.
        fp16_units: units whose products are computed in fp16.
        signed_inputs: inputs in 8 bits are taken by ranges around zero, as far as the calibrated ones reach.
    """

    def __init__(
        self,
        model: ir.Model,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        *,
        fp16_units: Collection[str] = (),
        signed_inputs: bool = False,
    ) -> None:
        self._graph, self._spec, self._names = model.graph, checkpoint.spec, names
        self._halved, self._signed_inputs = fp16_units, signed_inputs
        self._rounded = quantized_matrix.rounded(safetensors_io.read_folder(checkpoint.directory))
        self._ranges = modeling.input_ranges(checkpoint)
        self._inputs: dict[tuple[str, str], list[ir.Value]] = {}

    def install(self, units: Mapping[str, Sequence[str]]) -> None:
        """Replace the weights of all units on a grid; `units` names their modules."""
        for unit, form in self._spec.schemes.items():
            for module in units[unit]:
                tied = self._spec.tied_embeddings and unit in (LM_HEAD, EMBEDDING)
                names = [units[table][0] for table in (EMBEDDING, LM_HEAD)] if tied else [module]
                for node in [usage.node for usage in self._weight(names).uses()]:
                    if node.op_type == "Gather" and unit == EMBEDDING:
                        self._look_up(node, module, self._rounded[names[0]], form)
                    elif node.op_type == "Transpose" and unit != EMBEDDING:
                        self._multiply(node, unit, module, self._rounded[names[0]], form)
        for value in [value for value in self._graph.inputs if value.name in self._names.values()]:
            self._graph.inputs.remove(value)
        self._graph.sort()

    def _weight(self, modules: Iterable[str]) -> ir.Value:
        """The weight of the first of these modules that the graph has: of a tied table there is one."""
        inputs = {value.name: value for value in self._graph.inputs}
        return next(inputs[name] for name in map(self._names.__getitem__, modules) if name in inputs)

    def _multiply(
        self, transpose: ir.Node, unit: str, module: str, matrix: QuantizedMatrix, form: QuantizationScheme
    ) -> None:
        """Products with the transposed weight become products with whole numbers, (columns, rows)."""
        products = [usage.node for usage in transpose.outputs[0].uses()]
        if form.inputs == "float":
            weight = self._dequantized(transpose, unit, module, matrix, form)
            for product in products:
                product.replace_input_with(1, weight)
        elif form.inputs == "static":
            weight = self._dequantized(transpose, unit, module, matrix, form)
            for product in products:
                product.replace_input_with(0, self._rounded_input(product, unit))
                product.replace_input_with(1, weight)
        else:
            for product in products:
                self._multiply_integers(product, module, matrix)
        self._graph.remove(transpose, safe=True)

    def _dequantized(
        self, before: ir.Node, unit: str, module: str, matrix: QuantizedMatrix, form: QuantizationScheme
    ) -> ir.Value:
        """The weight, (columns, rows): scales of blocks are in fp16, and widened when it is loaded in fp32."""
        blocked = form.inputs == "float"
        codes, zero_points = _typed(matrix, form, signed=blocked or self._signed_inputs)
        scales = matrix.scales.numpy().T if blocked else matrix.scales.numpy().T[0]
        factors = (
            self._widened(before, f"{module}.scales", scales)
            if blocked and unit not in self._halved
            else self._store(f"{module}.scales", scales.astype(self._float(unit)))
        )
        inputs = [self._store(f"{module}.codes", codes.T), factors]
        if zero_points is not None:
            inputs.append(self._store(f"{module}.zero_points", zero_points.T if blocked else zero_points.T[0]))
        places = {"axis": 0, "block_size": form.block_size} if blocked else {"axis": 1}
        return self._node(before, "DequantizeLinear", inputs, f"{module}.weight", **places)

    def _rounded_input(self, product: ir.Node, unit: str) -> ir.Value:
        """The product's input in 8 bits and back, shared by all that read it."""
        found = product.inputs[0]
        assert found is not None
        key = str(found.name), "static"
        if key not in self._inputs:
            scale, zero_point = self._ranges[unit]
            middle = np.array(zero_point, np.uint8)
            if self._signed_inputs:
                scale, middle = max_magnitude(scale, zero_point) / 127, np.array(0, np.int8)
            factors = [
                self._store(f"{unit}.input.scale", np.array(scale, self._float(unit))),
                self._store(f"{unit}.input.zero_point", middle),
            ]
            codes = self._node(product, "QuantizeLinear", [found, *factors], f"{unit}.input.codes")
            self._inputs[key] = [self._node(product, "DequantizeLinear", [codes, *factors], f"{unit}.input")]
        return self._inputs[key][0]

    def _multiply_integers(self, product: ir.Node, module: str, matrix: QuantizedMatrix) -> None:
        """Inputs in 8 bits with a range of each call, times weights of one scale for each row."""
        found = product.inputs[0]
        assert found is not None
        key = str(found.name), "dynamic"
        if key not in self._inputs:
            made = ir.node("DynamicQuantizeLinear", [found], num_outputs=3, name=f"{found.name}.quantize")
            for value, part in zip(made.outputs, ("codes", "scale", "zero_point"), strict=True):
                value.name = f"{found.name}.{part}"
            self._graph.insert_before(product, [made])
            self._inputs[key] = list(made.outputs)
        codes, scale, zero_point = self._inputs[key]
        weight = self._store(f"{module}.codes", np.ascontiguousarray(matrix.codes.numpy().T))
        middle = self._store(f"{module}.zero_points", matrix.zero_points.numpy().reshape(-1))
        factors = self._store(f"{module}.scales", matrix.scales.numpy().reshape(-1).astype(np.float32))
        whole = self._node(product, "MatMulInteger", [codes, weight, zero_point, middle], f"{module}.integers")
        widened = self._node(product, "Cast", [whole], f"{module}.sums", to=ir.DataType.FLOAT)
        scaled = self._node(product, "Mul", [scale, factors], f"{module}.factors")
        result = self._node(product, "Mul", [widened, scaled], f"{module}.product")
        ir.convenience.replace_all_uses_with(product.outputs[0], result)
        self._graph.remove(product, safe=True)

    def _look_up(self, gather: ir.Node, module: str, matrix: QuantizedMatrix, form: QuantizationScheme) -> None:
        """Rows of a table by arithmetic: (code - zero_point) * scale for the few that are read."""
        tokens = gather.inputs[1]
        assert tokens is not None
        packed = self._store(f"{module}.codes", quantized_matrix.pack(matrix.codes, form.bits))
        codes = self._node(gather, "Gather", [packed, tokens], f"{module}.rows", axis=0)
        if form.bits == 4:
            mask = self._store(f"{module}.mask", np.array(15, np.uint8))
            shift = self._store(f"{module}.shift", np.array(4, np.uint8))
            halves = [
                self._node(gather, "BitwiseAnd", [codes, mask], f"{module}.low"),
                self._node(gather, "BitShift", [codes, shift], f"{module}.high", direction="RIGHT"),
            ]
            last = self._store(f"{module}.last", np.array([-1]))
            apart = [self._node(gather, "Unsqueeze", [half, last], f"{half.name}.apart") for half in halves]
            codes = self._node(gather, "Concat", apart, f"{module}.pairs", axis=-1)
        columns, blocks = matrix.codes.shape[1], matrix.scales.shape[1]
        in_blocks = self._store(f"{module}.in_blocks", np.array([0, 0, blocks, columns // blocks]))
        whole = self._store(f"{module}.whole", np.array([0, 0, columns]))
        codes = self._node(gather, "Reshape", [codes, in_blocks], f"{module}.blocks")
        codes = self._node(gather, "Cast", [codes], f"{module}.numbers", to=ir.DataType.FLOAT)
        middle = self._row(gather, module, "zero_points", matrix.zero_points.numpy(), tokens)
        scales = self._row(gather, module, "scales", matrix.scales.numpy().astype(np.float16), tokens)
        centred = self._node(gather, "Sub", [codes, middle], f"{module}.centred")
        scaled = self._node(gather, "Mul", [centred, scales], f"{module}.scaled")
        ir.convenience.replace_all_uses_with(
            gather.outputs[0], self._node(gather, "Reshape", [scaled, whole], f"{module}.found")
        )
        self._graph.remove(gather, safe=True)

    def _row(self, gather: ir.Node, module: str, part: str, table: np.ndarray, tokens: ir.Value) -> ir.Value:
        """What each block of the rows has beside its codes, (batch, tokens, blocks, 1)."""
        stored, last = self._store(f"{module}.{part}", table), self._store(f"{module}.last", np.array([-1]))
        found = self._node(gather, "Gather", [stored, tokens], f"{module}.{part}.rows", axis=0)
        widened = self._node(gather, "Cast", [found], f"{module}.{part}.widened", to=ir.DataType.FLOAT)
        return self._node(gather, "Unsqueeze", [widened, last], f"{module}.{part}.apart")

    def _widened(self, before: ir.Node, name: str, values: np.ndarray) -> ir.Value:
        """Numbers that are exact in fp16, stored so."""
        half = self._store(name, values.astype(np.float16))
        return self._node(before, "Cast", [half], f"{name}.widened", to=ir.DataType.FLOAT)

    def _float(self, unit: str) -> type[np.floating[Any]]:
        """What the unit is computed in."""
        return np.float16 if unit in self._halved else np.float32

    def _store(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            self._graph.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._graph.initializers[name]

    def _node(self, before: ir.Node, kind: str, inputs: Sequence[ir.Value], output: str, **attributes: Any) -> ir.Value:
        made = ir.node(kind, inputs, attributes, name=output)
        made.outputs[0].name = output
        self._graph.insert_before(before, [made])
        return made.outputs[0]


def _typed(matrix: QuantizedMatrix, form: QuantizationScheme, *, signed: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and zero-points, (rows, …); a symmetric grid needs none where it may be stored `signed`.

    Signed weights times unsigned inputs saturate on CPUs without VNNI.
    """
    codes, zero_points = matrix.codes.numpy(), matrix.zero_points.numpy()
    if form.symmetric and signed:
        middle = 2 ** (form.bits - 1)
        return (codes.astype(np.int16) - middle).astype(np.int8).astype(_SIGNED[form.bits]), None
    kind = _UNSIGNED[form.bits]
    return codes.astype(kind), zero_points.astype(kind)
