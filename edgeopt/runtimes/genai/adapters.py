"""Build graphs whose adapters are selected per request: each adapted matrix product becomes y + (x · A) · B.

A and B are graph inputs with defaults of rank 0, so the engine computes its base model if no adapter is active. ONNX
Runtime feeds them from one file per adapter, of any rank and for any subset of the products.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRankUpdate
from edgeopt.errors import BuildError
from edgeopt.runtimes.genai.layout import GENERATION_GRAPH, adapter_path
from edgeopt.runtimes.genai.quantized_nodes import node_rows

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint


class AdapterNodes:
    """Add an adapter branch to each node in `adapted_nodes`, made by the builder or by QuantizedNodes."""

    def __init__(self, model: Any, adapted_nodes: Collection[str]) -> None:
        self._model, self._adapted_nodes, self._make_base = model, adapted_nodes, model.make_matmul_float

    def install(self) -> None:
        """Replace the builder's method."""
        self._model.make_matmul_float = self.make_matmul

    def make_matmul(self, float_matrix: Any, name: str, root_input: str, **options: Any) -> str:
        """Implement the builder's make_matmul_float: return the name of the node whose output is the product."""
        base: str = self._make_base(float_matrix, name, root_input, **options)
        if name not in self._adapted_nodes:
            return base
        rows, columns = float_matrix.weight.shape
        a, b = _factor_inputs(name)
        branch, rank = f"{name}/adapter", f"{a}.rank"
        self._add_input(a, [columns, rank])
        self._add_input(b, [rank, rows])
        self._add_node("MatMul", [root_input, a], f"{branch}/A", rank)
        self._add_node("MatMul", [f"{branch}/A/output_0", b], f"{branch}/B", rows)
        self._add_node("Add", [f"{base}/output_0", f"{branch}/B/output_0"], branch, rows)
        return branch

    def _add_input(self, name: str, shape: list[int | str]) -> None:
        import numpy as np

        default = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
        self._model.make_initializer(default, name)
        self._model.model.graph.inputs.append(self._model.make_value(name, shape=shape))

    def _add_node(self, op_type: str, inputs: list[str], name: str, width: int | str) -> None:
        output = f"{name}/output_0"
        self._model.make_node(op_type, inputs=inputs, outputs=[output], name=name)
        self._model.make_value(output, self._model.io_dtype, shape=self._model.make_hidden_state_shape(last_dim=width))


def updates_by_node(network: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, dict[str, LowRankUpdate]]:
    """Return the updates of each adapter of the checkpoint by the names of the builder's nodes."""
    by_adapter: dict[str, dict[str, LowRankUpdate]] = {}
    for name in checkpoint.spec.adapters:
        updates = adapters.read(checkpoint.directory, name)
        by_adapter[name] = {}
        for unit, modules in modeling.unit_modules(network).items():
            parts = [(len(network.get_submodule(m).weight), updates.get(m)) for m in modules]
            start = 0
            for node, rows in node_rows(unit, sum(size for size, _ in parts)).items():
                update = slice_stacked_updates(parts, start, rows)
                if update is not None:
                    by_adapter[name][node] = update
                start += rows
    return by_adapter


def slice_stacked_updates(
    parts: Sequence[tuple[int, LowRankUpdate | None]], start: int, rows: int
) -> LowRankUpdate | None:
    """Return the update of rows `start` to `start + rows` of matrices that are stacked along their rows.

    The rank of the result is the sum of the ranks, because each update acts on its own rows.

    Args:
        parts: row count and update of each matrix; None without an update.

    Returns:
        None if no update affects these rows.
    """
    import torch

    downs, ups, offset = [], [], 0
    for size, update in parts:
        first, last = max(offset, start), min(offset + size, start + rows)
        if update is not None and first < last:
            up = torch.zeros(rows, update.up.shape[1])
            up[first - start : last - start] = update.up[first - offset : last - offset]
            downs.append(update.down)
            ups.append(up)
        offset += size
    return LowRankUpdate(down=torch.cat(downs), up=torch.cat(ups, dim=1)) if downs else None


def export(by_adapter: Mapping[str, Mapping[str, LowRankUpdate]], directory: Path) -> None:
    """Write one file per adapter. Raises BuildError if the graph has no input for an update."""
    import onnx
    from onnxruntime import AdapterFormat, OrtValue

    graph_inputs = {
        value.name for value in onnx.load(directory / GENERATION_GRAPH, load_external_data=False).graph.input
    }
    (directory / adapters.FOLDER).mkdir()
    for name, updates in by_adapter.items():
        arrays: dict[str, np.ndarray] = {}
        for node, update in updates.items():
            factors = (update.down.T.contiguous().numpy(), update.up.T.contiguous().numpy())
            arrays |= dict(zip(_factor_inputs(node), factors, strict=True))
        if not arrays.keys() <= graph_inputs:
            raise BuildError(f"the graph has no input {min(arrays.keys() - graph_inputs)} for adapter {name!r}")
        adapter = AdapterFormat()
        adapter.set_parameters({key: OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()})
        adapter.export_adapter(str(directory / adapter_path(name)))


def _factor_inputs(node: str) -> tuple[str, str]:
    """Return the names of the inputs A and B of a node's adapter branch."""
    prefix = node[1:].replace("/", ".")
    return f"{prefix}.lora_A", f"{prefix}.lora_B"
