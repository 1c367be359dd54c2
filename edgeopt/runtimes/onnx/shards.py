"""A graph cut into consecutive shards, so that a session needs the weights of one after another.

Shards have no weights of their own: they name places in the one file of weights that the whole graph has.
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


LIST = "shards.json"
PACKED = "prepacked_"
"""How ONNX Runtime begins the keys under which a tensor has its packed forms: name|offset;length;checksum|…"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard of an engine.

    Attributes:
        weights: offset and length, in bytes of the file of weights, of each tensor that it reads as a whole.
    """

    graph: Path
    weights: Sequence[tuple[int, int]]

    @property
    def size_bytes(self) -> int:
        return sum(length for _, length in self.weights)


def read(directory: Path) -> list[Shard]:
    """The shards of an engine in their order; none where it was not cut."""
    path = directory / LIST
    listed = json.loads(path.read_text()) if path.is_file() else {}
    return [
        Shard(graph=directory / name, weights=[(offset, length) for offset, length in weights])
        for name, weights in listed.items()
    ]


def split(directory: Path, count: int) -> None:
    """Write `count` shards beside the graph in `directory`, of about equally many bytes of weights.

    Nodes keep their order, and cuts lie where the fewest values cross, which is between layers or their halves. They
    are fewer where a matrix is larger than such a shard; BuildError where it cannot be cut at all.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(directory / graph.GRAPH_FILE, load_external_data=False))
    crossing = _crossing(model.graph)
    bounds = _bounds(model.graph, crossing, count)
    listed = {}
    for number, (start, end) in enumerate(zip([0, *bounds], [*bounds, len(model.graph.node)], strict=True)):
        name, shard = f"shard-{number:02d}.onnx", _shard(model, crossing, start, end)
        onnx.save(shard, directory / name)
        whole = {name for node in shard.graph.node for name in _read_whole(node)}
        listed[name] = sorted(place for t in shard.graph.initializer if t.name in whole for place in _places(t))
    (directory / LIST).write_text(json.dumps(listed, indent=1) + "\n")


def _bounds(whole: GraphProto, crossing: Sequence[set[str]], count: int) -> list[int]:
    """Before which nodes a new shard begins: near each share of the bytes, where the fewest values cross."""
    read = _bytes_read(whole)
    total = read[-1]
    bounds = [0]
    for number in range(1, count):
        wanted = total * number / count
        later = range(bounds[-1] + 1, len(whole.node))
        near = ([p for p in later if abs(read[p] - wanted) <= total / count / part] for part in (4, 2))
        if places := next(filter(None, near), []):
            bounds.append(min(places, key=lambda location: (len(crossing[location]), abs(read[location] - wanted))))
    if len(bounds) == 1:
        raise BuildError("the graph has no place to cut it at", location="runtime.shards", hint="Give 1")
    return bounds[1:]


def _crossing(whole: GraphProto) -> list[set[str]]:
    """For each node, and the end, the values that were computed before it and are used by it or later."""
    last_use = {name: index for index, node in enumerate(whole.node) for name in _used(node)}
    alive: set[str] = set()
    found = []
    for index, node in enumerate(whole.node):
        alive = {name for name in alive if last_use[name] >= index}
        found.append(alive)
        alive = alive | {name for name in node.output if last_use.get(name, -1) > index}
    return [*found, set()]


def _bytes_read(whole: GraphProto) -> list[int]:
    """For each node, and the end, the bytes of weights that nodes before it read; each weight counts once."""
    sizes = {tensor.name: _size(tensor) for tensor in whole.initializer}
    read, seen = [0], set[str]()
    for node in whole.node:
        fresh = {name for name in _read_whole(node) if name in sizes} - seen
        seen |= fresh
        read.append(read[-1] + sum(sizes[name] for name in fresh))
    return read


def _size(tensor: TensorProto) -> int:
    return sum(length for _, length in _places(tensor)) if tensor.external_data else len(tensor.raw_data)


def _places(tensor: TensorProto) -> list[tuple[int, int]]:
    """Offset and length in the file of weights of what kernels read of a tensor, in packed form where it has one.

    None for a small tensor, which stands in the graph.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    packed = [value for key, value in entries.items() if key.startswith(PACKED)]
    if packed:
        return [_packed_place(entry) for value in packed for entry in value.split("|")[1:]]
    return [(int(entries.get("offset", 0)), int(entries["length"]))] if entries else []


def _packed_place(told: str) -> tuple[int, int]:
    offset, length, _ = map(int, told.split(";"))
    return offset, length


def _used(node: NodeProto) -> Iterator[str]:
    """Names of what a node reads, the graphs inside it included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inside in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            own = {name for inner in inside.node for name in inner.output} | {value.name for value in inside.input}
            yield from (name for inner in inside.node for name in _used(inner) if name not in own)


def _read_whole(node: NodeProto) -> set[str]:
    """Names of what a node reads, but for a table of which it looks up rows."""
    return set(_used(node)) - ({node.input[0]} if node.op_type == "Gather" else set())


def _shard(model: ModelProto, crossing: Sequence[set[str]], start: int, end: int) -> ModelProto:
    """The nodes from `start` to before `end`, with what crosses their bounds as inputs and outputs."""
    from onnx import helper

    whole = model.graph
    nodes = whole.node[start:end]
    used = {name for node in nodes for name in _used(node)}
    made = {name for node in nodes for name in node.output}
    known = {value.name: value for value in (*whole.value_info, *whole.input, *whole.output)}
    outputs = [value.name for value in whole.output]
    entering = [value.name for value in whole.input if value.name in used] + sorted(crossing[start] & used)
    leaving = [name for name in outputs if name in made] + sorted((crossing[end] & made) - set(outputs))
    unknown = [name for name in (*entering, *leaving) if name not in known]
    if unknown:
        raise BuildError(f"the exporter told no type of {unknown[0]!r}, at which the graph is to be cut")
    shard = helper.make_graph(
        nodes,
        f"{whole.name}-{start}",
        [known[name] for name in entering],
        [known[name] for name in leaving],
        [tensor for tensor in whole.initializer if tensor.name in used],
        value_info=[value for value in whole.value_info if value.name in made and value.name not in leaving],
    )
    return helper.make_model(
        shard, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
