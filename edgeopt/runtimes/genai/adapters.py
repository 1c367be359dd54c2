"""Adapters that requests choose, as inputs of a graph: each product that one touches gets a branch y + (x · A) · B.

A and B are inputs whose defaults have rank 0, so an engine computes its base where no adapter is active. ONNX Runtime
feeds them from a file for each adapter, of any rank and for any part of the products.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRankUpdate
from edgeopt.errors import BuildError
from edgeopt.runtimes.genai.quantized_nodes import nodes

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint


class AdapterNodes:
    """Writes a branch beside each node in `touched`, whether onnxruntime-genai's own or one of GridNodes."""

    def __init__(self, model: Any, touched: Collection[str]) -> None:
        self._model, self._touched, self._make_base = model, touched, model.make_matmul_float

    def install(self) -> None:
        self._model.make_matmul_float = self.matmul

    def matmul(self, float_matrix: Any, name: str, root_input: str, **options: Any) -> str:
        """As the builder's make_matmul_float: the name of the node whose output is the product."""
        base: str = self._make_base(float_matrix, name, root_input, **options)
        if name not in self._touched:
            return base
        rows, columns = float_matrix.weight.shape
        a, b = _inputs(name)
        branch, rank = f"{name}/adapter", f"{a}.rank"
        self._input(a, [columns, rank])
        self._input(b, [rank, rows])
        self._node("MatMul", [root_input, a], f"{branch}/A", rank)
        self._node("MatMul", [f"{branch}/A/output_0", b], f"{branch}/B", rows)
        self._node("Add", [f"{base}/output_0", f"{branch}/B/output_0"], branch, rows)
        return branch

    def _input(self, name: str, shape: list[int | str]) -> None:
        import numpy as np

        default = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
        self._model.make_initializer(default, name)
        self._model.model.graph.inputs.append(self._model.make_value(name, shape=shape))

    def _node(self, kind: str, inputs: list[str], name: str, width: int | str) -> None:
        output = f"{name}/output_0"
        self._model.make_node(kind, inputs=inputs, outputs=[output], name=name)
        self._model.make_value(output, self._model.io_dtype, shape=self._model.make_hidden_state_shape(last_dim=width))


def by_node(network: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, dict[str, LowRankUpdate]]:
    """The updates of each adapter of the checkpoint, by the names that the builder gives its nodes."""
    found: dict[str, dict[str, LowRankUpdate]] = {}
    for name in checkpoint.spec.adapters:
        updates = adapters.read(checkpoint.directory, name)
        found[name] = {}
        for unit, modules in modeling.units(network).items():
            parts = [(len(network.get_submodule(m).weight), updates.get(m)) for m in modules]
            start = 0
            for node, rows in nodes(unit, sum(size for size, _ in parts)).items():
                update = stacked(parts, start, rows)
                if update is not None:
                    found[name][node] = update
                start += rows
    return found


def stacked(parts: Sequence[tuple[int, LowRankUpdate | None]], start: int, rows: int) -> LowRankUpdate | None:
    """The update of rows `start` to `start + rows` of matrices that stand one below the other.

    `parts` gives the rows of each and its update, where it has one. Ranks add up, each acting on its own rows; None
    where nothing is updated.
    """
    import torch

    downs, ups, top = [], [], 0
    for size, update in parts:
        first, last = max(top, start), min(top + size, start + rows)
        if update is not None and first < last:
            up = torch.zeros(rows, update.up.shape[1])
            up[first - start : last - start] = update.up[first - top : last - top]
            downs.append(update.down)
            ups.append(up)
        top += size
    return LowRankUpdate(down=torch.cat(downs), up=torch.cat(ups, dim=1)) if downs else None


def export(found: Mapping[str, Mapping[str, LowRankUpdate]], directory: Path) -> None:
    """Write each adapter's file beside the graph. Raises BuildError where the graph has no place for an update."""
    import onnx
    from onnxruntime import AdapterFormat, OrtValue

    taken = {value.name for value in onnx.load(directory / "model.onnx", load_external_data=False).graph.input}
    (directory / adapters.FOLDER).mkdir()
    for name, updates in found.items():
        arrays: dict[str, np.ndarray] = {}
        for node, update in updates.items():
            factors = (update.down.T.contiguous().numpy(), update.up.T.contiguous().numpy())
            arrays |= dict(zip(_inputs(node), factors, strict=True))
        if not arrays.keys() <= taken:
            raise BuildError(f"the graph has no place for {min(arrays.keys() - taken)} of adapter {name!r}")
        written = AdapterFormat()
        written.set_parameters({key: OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()})
        written.export_adapter(str(path_of(directory, name)))


def path_of(directory: Path, name: str) -> Path:
    """Where an engine keeps the adapter `name`."""
    return directory / adapters.FOLDER / f"{name}.onnx_adapter"


def _inputs(node: str) -> tuple[str, str]:
    """Names of the inputs A and B of a node's branch."""
    prefix = node[1:].replace("/", ".")
    return f"{prefix}.lora_A", f"{prefix}.lora_B"
