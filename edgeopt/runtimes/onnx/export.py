"""A checkpoint as a graph of standard ONNX operators, by torch's exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from edgeopt.checkpoints import adapters, modeling
from edgeopt.core.artifact import link_file
from edgeopt.errors import BuildError
from edgeopt.runtimes.onnx import graph, opset_lowering, qdq
from edgeopt.runtimes.onnx.kv_cache_graph import Layer, examples, kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.adapters import LowRankUpdate
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress

ATTENTION = "edgeopt_portable"
BATCH, TOKENS, CAPACITY, RECENT, ROWS, RANK, PAST, POSITION = 2, 3, 11, 6, 5, 7, 4, 9
"""Sizes of the example that is traced, all of them dynamic: different ones, so that none is taken for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What a consumer of the graph asks for.

    Attributes:
        opset: version of the ONNX standard.
        keys_values: the type in which they are kept, of graph.CACHE_SUFFIXES.
        fp16_units: units that multiply in fp16. If there are any, the operators between units compute in fp16 too.
        signed_inputs: inputs in 8 bits are taken by ranges around zero, as far as the calibrated ones reach.
    """

    opset: int
    keys_values: str = "fp32"
    fp16_units: frozenset[str] = frozenset()
    signed_inputs: bool = False


def build(checkpoint: Checkpoint, directory: Path, *, options: ExportOptions, progress: Progress) -> None:
    """Write the graph, its weights in one file beside it, adapters and the tokenizer. Raises BuildError."""
    import onnx_ir

    progress(f"exporting {checkpoint.spec.architecture} to ONNX, opset {options.opset}")
    network = modeling.load(checkpoint)
    touched = _touched(checkpoint)
    units = modeling.units(network) if checkpoint.spec.schemes or options.fp16_units else {}
    on_grid = {unit: units[unit] for unit in units if unit in checkpoint.spec.schemes}
    try:
        network.set_attn_implementation("eager" if _is_capped(network) else ATTENTION)
        if options.fp16_units:
            _halve(network, {module for unit in units.keys() - options.fp16_units for module in units[unit]})
        with _quiet():
            program = _exported(_Traced(network, touched, options.keys_values), checkpoint.spec, options)
            names = {module: f"network.{module}.weight" for unit in on_grid.values() for module in unit}
            qdq.hide_weights(program.model, names.values())
            program.optimize()
            model = program.model
            qdq.QdqNodes(
                model, checkpoint, names, fp16_units=options.fp16_units, signed_inputs=options.signed_inputs
            ).install(on_grid)
    except Exception as error:  # whatever an exporter of another project raises is a failed build
        raise BuildError(f"torch could not export {checkpoint.spec.architecture} to ONNX: {error}") from error
    opset_lowering.lower(model, options.opset)
    if checkpoint.spec.weight_dtype == "fp16" and not options.fp16_units:
        _store_in_fp16(model)
    _make_optional(model, [name for module in touched for name in adapters.names(module)])
    _forget_origin(model)
    onnx_ir.save(model, directory / graph.GRAPH_FILE, external_data=graph.WEIGHTS_FILE)
    modeling.carry(checkpoint.directory, directory)
    for file in (Path("config.json"), *map(adapters.path_of, checkpoint.spec.adapters)):
        link_file(checkpoint.directory / file, directory / file)


class _Traced(nn.Module):
    """A network whose cache and adapters are inputs.

    Args:
        touched: the modules that some adapter updates.
        form: the type in which keys and values are kept.
    """

    def __init__(self, network: PreTrainedModel, touched: Sequence[str], form: str) -> None:
        super().__init__()
        config = network.config.get_text_config()
        self.network, self.touched, self.form = network, touched, form
        self.kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.eval()

    def forward(
        self,
        tokens: Tensor,
        length: Tensor,
        position: Tensor,
        rows: Tensor,
        past: list[list[Tensor]],
        factors: list[Tensor],
    ) -> tuple[Tensor, ...]:
        both = [kept(self.form, buffers) for buffers in past]
        layers = [
            Layer(keys, values, length, position, sliding=kind == "sliding_attention")
            for keys, values, kind in zip(both[::2], both[1::2], self.kinds, strict=True)
        ]
        pairs = zip(factors[::2], factors[1::2], strict=True)
        updates = {
            name: adapters.LowRankUpdate(down=down, up=up) for name, (down, up) in zip(self.touched, pairs, strict=True)
        }
        with adapters.attached(self.network, updates):
            found = self.network(
                tokens,
                position_ids=(torch.arange(tokens.shape[1]) + position).expand(tokens.shape),
                past_key_values=Cache(layers=layers),
                use_cache=True,
                logits_to_keep=rows,
            )
        return (found.logits, *(buffer for one in both for buffer in one.buffers))

    def factors(self) -> list[Tensor]:
        """An example of the two factors for each touched module."""
        sides = (self.network.get_submodule(name).weight.shape for name in self.touched)
        return [factor for rows, columns in sides for factor in (torch.zeros(RANK, columns), torch.zeros(rows, RANK))]


def _exported(traced: _Traced, spec: ModelSpec, options: ExportOptions) -> Any:
    """The graph as it was traced."""
    dynamic = torch.export.Dim.DYNAMIC
    past = [
        examples(
            "fp16" if options.fp16_units else options.keys_values,
            batch=BATCH,
            heads=layer.kv_heads,
            capacity=CAPACITY,
            recent=RECENT,
            head_size=spec.head_size,
        )
        for layer in spec.layers
        for _ in ("key", "value")
    ]
    factors = traced.factors()
    tokens, rows = torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.arange(ROWS) % TOKENS
    given = (tokens, torch.tensor(PAST), torch.tensor(POSITION), rows)
    past_names, present_names = (
        graph.cache_names(len(spec.layers), prefix, options.keys_values)
        for prefix in (graph.PAST_PREFIX, graph.PRESENT_PREFIX)
    )
    names = [name for module in traced.touched for name in adapters.names(module)]
    program = torch.onnx.export(
        traced,
        (*given, past, factors),
        dynamo=True,
        opset_version=max(options.opset, opset_lowering.OLDEST),
        dynamic_shapes=(
            {0: dynamic, 1: dynamic},
            {},
            {},
            {0: dynamic},
            [[{0: dynamic, 2: dynamic} for _ in buffers] for buffers in past],
            [{index % 2: dynamic} for index in range(len(factors))],
        ),
        input_names=[graph.INPUT_IDS, graph.PAST_LENGTH, graph.POSITION, graph.ROWS, *past_names, *names],
        output_names=[graph.LOGITS, *present_names],
        verbose=False,
        optimize=False,
    )
    assert program is not None
    return program


def _halve(network: PreTrainedModel, widened: Collection[str]) -> None:
    """Compute in fp16, but for the modules `widened`, which take what they read and give what they find in fp16.

    Buffers stay as they are: rotary frequencies are computed in fp32.
    """
    for name, module in network.named_modules():
        if name in widened:
            module.register_forward_pre_hook(_in_fp32)
            module.register_forward_hook(_in_fp16)
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.half()


def _in_fp32(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in given)


def _in_fp16(_: nn.Module, __: tuple[Tensor, ...], found: Tensor) -> Tensor:
    return found.half()


def _is_capped(network: PreTrainedModel) -> bool:
    """Whether attention caps its scores, which no fused operator of torch does."""
    return getattr(network.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _touched(checkpoint: Checkpoint) -> list[str]:
    """Modules that some adapter of the checkpoint updates."""
    found: dict[str, LowRankUpdate] = {}
    for name in checkpoint.spec.adapters:
        found |= adapters.read(checkpoint.directory, name)
    return list(found)


def _make_optional(model: Any, names: Sequence[str]) -> None:
    """Give the adapters' inputs defaults of rank 0, with which the graph computes the base."""
    import numpy as np
    import onnx_ir

    inputs: Mapping[str, Any] = {value.name: value for value in model.graph.inputs}
    for name in names:
        shape = [size if isinstance(size, int) else 0 for size in inputs[name].shape]
        inputs[name].const_value = onnx_ir.tensor(np.zeros(shape, np.float32), name=name)
        model.graph.initializers[name] = inputs[name]


def _store_in_fp16(model: Any) -> None:
    """Store matrices in fp16, and widen them when the graph is loaded."""
    import numpy as np
    import onnx_ir

    for name, value in list(model.graph.initializers.items()):
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.ndim != 2:
            continue
        tensor = onnx_ir.tensor(array.astype(np.float16), name=f"{name}.halves")
        stored = onnx_ir.Value(
            name=tensor.name, shape=value.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
        )
        widen = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT}, name=f"{name}.widen")
        widen.outputs[0].name = f"{name}.widened"
        model.graph.initializers[tensor.name] = stored
        onnx_ir.convenience.replace_all_uses_with(value, widen.outputs[0])
        del model.graph.initializers[name]
        model.graph.insert_before(model.graph[0], [widen])


def _forget_origin(model: Any) -> None:
    """Drop what tells where and by whom it was exported, so that equal checkpoints give equal bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in which fewer heads of keys and values than of queries stay as they are, and are not repeated."""
    grouped = query.shape[1] != key.shape[1]
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
    )
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells what it looks for and does not find; only its errors matter here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
