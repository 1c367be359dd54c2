"""Split a graph into consecutive shards, so that a session needs the weights of only one shard at a time.

A shard has no weights of its own. It refers to offsets in the weights file of the whole graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import BuildError
from edgeopt.runtimes.onnx import graph

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto


SHARDS_FILE = "shards.json"
PREPACKED_KEY = "prepacked_"
"""Prefix of the keys under which ONNX Runtime lists the prepacked forms of a tensor.

Their value has the form `name|offset;length;checksum|…`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard of an engine.

    Attributes:
        graph: path of the shard's ONNX file.
        weights: offset and length, in bytes of the weights file, of each tensor that the shard reads completely.
    """

    graph: Path
    weights: Sequence[tuple[int, int]]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of weights that the shard reads for each token."""
        return sum(length for _, length in self.weights)


def read(directory: Path) -> list[Shard]:
    """Return the shards of the engine in `directory`, in order; empty if the engine has none."""
    path = directory / SHARDS_FILE
    document = json.loads(path.read_text()) if path.is_file() else {}
    return [
        Shard(graph=directory / name, weights=[(offset, length) for offset, length in weights])
        for name, weights in document.items()
    ]


def split(directory: Path, count: int) -> None:
    """Write up to `count` shards of about equal size beside the graph in `directory`.

    Nodes keep their order. Cuts are placed where the fewest values cross, which is between layers or their halves. A
    matrix larger than a shard reduces the number of shards. Raises BuildError if the graph cannot be split at all.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(directory / graph.GRAPH_FILE, load_external_data=False))
    crossing = _crossing_values(model.graph)
    cuts = _choose_cuts(model.graph, crossing, count)
    document = {}
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(model.graph.node)], strict=True)):
        name, shard = f"shard-{number:02d}.onnx", _extract_shard(model, crossing, start, end)
        onnx.save(shard, directory / name)
        read_names = {name for node in shard.graph.node for name in _fully_read_names(node)}
        document[name] = sorted(
            extent for tensor in shard.graph.initializer if tensor.name in read_names for extent in _extents(tensor)
        )
    (directory / SHARDS_FILE).write_text(json.dumps(document, indent=1) + "\n")


def _choose_cuts(whole: GraphProto, crossing: Sequence[set[str]], count: int) -> list[int]:
    """Return the index of the first node of each shard except the first.

    Each cut is near an equal share of the bytes, at the node where the fewest values cross.
    """
    bytes_before = _cumulative_bytes(whole)
    total_bytes = bytes_before[-1]
    cuts = [0]
    for number in range(1, count):
        target_bytes = total_bytes * number / count
        later_nodes = range(cuts[-1] + 1, len(whole.node))
        candidates = (
            [n for n in later_nodes if abs(bytes_before[n] - target_bytes) <= total_bytes / count / divisor]
            for divisor in (4, 2)
        )
        if nodes := next(filter(None, candidates), []):
            cuts.append(min(nodes, key=lambda n: (len(crossing[n]), abs(bytes_before[n] - target_bytes))))
    if len(cuts) == 1:
        raise BuildError("the graph cannot be split into shards", location="runtime.shards", hint="Use shards=1")
    return cuts[1:]


def _crossing_values(whole: GraphProto) -> list[set[str]]:
    """Return, for each node and the end, the values that an earlier node computes and this or a later node reads."""
    last_use = {name: index for index, node in enumerate(whole.node) for name in _read_names(node)}
    alive: set[str] = set()
    crossing = []
    for index, node in enumerate(whole.node):
        alive = {name for name in alive if last_use[name] >= index}
        crossing.append(alive)
        alive = alive | {name for name in node.output if last_use.get(name, -1) > index}
    return [*crossing, set()]


def _cumulative_bytes(whole: GraphProto) -> list[int]:
    """Return, for each node and the end, the bytes of weights that earlier nodes read. Each weight counts once."""
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in whole.initializer}
    totals, seen = [0], set[str]()
    for node in whole.node:
        new = {name for name in _fully_read_names(node) if name in sizes} - seen
        seen |= new
        totals.append(totals[-1] + sum(sizes[name] for name in new))
    return totals


def _tensor_bytes(tensor: TensorProto) -> int:
    return sum(length for _, length in _extents(tensor)) if tensor.external_data else len(tensor.raw_data)


def _extents(tensor: TensorProto) -> list[tuple[int, int]]:
    """Return offset and length, in the weights file, of the data that kernels read: the prepacked form if it exists.

    Small tensors are inside the graph and have none.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    prepacked = [value for key, value in entries.items() if key.startswith(PREPACKED_KEY)]
    if prepacked:
        return [_parse_prepacked(entry) for value in prepacked for entry in value.split("|")[1:]]
    return [(int(entries.get("offset", 0)), int(entries["length"]))] if entries else []


def _parse_prepacked(entry: str) -> tuple[int, int]:
    offset, length, _checksum = map(int, entry.split(";"))
    return offset, length


def _read_names(node: NodeProto) -> Iterator[str]:
    """Yield the names of the values that a node and its subgraphs read."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            local = {name for inner in subgraph.node for name in inner.output}
            local |= {value.name for value in subgraph.input}
            yield from (name for inner in subgraph.node for name in _read_names(inner) if name not in local)


def _fully_read_names(node: NodeProto) -> set[str]:
    """Return the names of the values that a node reads completely. Gather reads only rows of its table."""
    return set(_read_names(node)) - ({node.input[0]} if node.op_type == "Gather" else set())


def _extract_shard(model: ModelProto, crossing: Sequence[set[str]], start: int, end: int) -> ModelProto:
    """Return the nodes in `start:end` as a model whose inputs and outputs include the crossing values."""
    from onnx import helper

    whole = model.graph
    nodes = whole.node[start:end]
    read_names = {name for node in nodes for name in _read_names(node)}
    computed = {name for node in nodes for name in node.output}
    known = {value.name: value for value in (*whole.value_info, *whole.input, *whole.output)}
    graph_outputs = [value.name for value in whole.output]
    inputs = [value.name for value in whole.input if value.name in read_names] + sorted(crossing[start] & read_names)
    outputs = [name for name in graph_outputs if name in computed]
    outputs += sorted((crossing[end] & computed) - set(graph_outputs))
    untyped = [name for name in (*inputs, *outputs) if name not in known]
    if untyped:
        raise BuildError(
            f"the graph cannot be split at {untyped[0]!r}, because shape inference found no type for it",
            location="runtime.shards",
            hint="Use shards=1",
        )
    shard = helper.make_graph(
        nodes,
        f"{whole.name}-{start}",
        [known[name] for name in inputs],
        [known[name] for name in outputs],
        [tensor for tensor in whole.initializer if tensor.name in read_names],
        value_info=[value for value in whole.value_info if value.name in computed and value.name not in outputs],
    )
    return helper.make_model(
        shard, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
