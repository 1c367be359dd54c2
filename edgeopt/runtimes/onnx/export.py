"""Export a checkpoint to an ONNX graph of standard operators with PyTorch's exporter."""

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
from edgeopt.runtimes.onnx.kv_cache_graph import CacheLayer, example_buffers, wrap_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.adapters import LowRankUpdate
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress

ATTENTION = "edgeopt_portable"
"""Name under which transformers finds `_grouped_attention`."""
BATCH, TOKENS, CAPACITY, RECENT, ROWS, RANK, PAST, POSITION = 2, 3, 11, 6, 5, 7, 4, 9
"""Dynamic sizes and scalar inputs of the traced example. All differ, so that the exporter never equates two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of the exported graph.

    Attributes:
        opset: opset version of the graph.
        cache_type: type of cached keys and values, a key of `graph.CACHE_SUFFIXES`.
        fp16_units: units that multiply in fp16. If there are any, the operators between units compute in fp16 too.
        signed_inputs: quantize activations with static ranges to int8 with zero-point 0, with a scale that covers the
            calibrated range. The default is uint8 with the calibrated zero-point.
    """

    opset: int
    cache_type: str = "fp32"
    fp16_units: frozenset[str] = frozenset()
    signed_inputs: bool = False


def export_checkpoint(checkpoint: Checkpoint, directory: Path, *, options: ExportOptions, progress: Progress) -> None:
    """Write the graph, its weights, the config, the adapters and the tokenizer into `directory`.

    Raises:
        BuildError: the exporter fails, or the opset does not support an operator.
    """
    import onnx_ir

    progress(f"exporting {checkpoint.spec.architecture} to ONNX, opset {options.opset}")
    network = modeling.load(checkpoint)
    adapted_modules = _adapted_modules(checkpoint)
    units = modeling.unit_modules(network) if checkpoint.spec.schemes or options.fp16_units else {}
    quantized_units = {unit: units[unit] for unit in units if unit in checkpoint.spec.schemes}
    try:
        network.set_attn_implementation("eager" if _caps_attention_scores(network) else ATTENTION)
        if options.fp16_units:
            _convert_to_fp16(network, {module for unit in units.keys() - options.fp16_units for module in units[unit]})
        with _silence_exporter():
            traced = _TracedDecoder(network, adapted_modules, options.cache_type)
            program = _export_program(traced, checkpoint.spec, options)
            weight_names = {module: f"network.{module}.weight" for unit in quantized_units.values() for module in unit}
            qdq.hide_weights(program.model, weight_names.values())
            program.optimize()
            model = program.model
            nodes = qdq.QdqNodes(
                model,
                checkpoint,
                weight_names,
                fp16_units=options.fp16_units,
                signed_inputs=options.signed_inputs,
            )
            nodes.insert(quantized_units)
    except Exception as error:  # torch's exporter raises errors of many classes
        raise BuildError(f"PyTorch cannot export {checkpoint.spec.architecture} to ONNX: {error}") from error
    opset_lowering.lower(model, options.opset)
    if checkpoint.spec.weight_dtype == "fp16" and not options.fp16_units:
        _store_in_fp16(model)
    _add_input_defaults(model, [name for module in adapted_modules for name in adapters.factor_names(module)])
    _remove_metadata(model)
    onnx_ir.save(model, directory / graph.GRAPH_FILE, external_data=graph.WEIGHTS_FILE)
    modeling.copy_model_files(checkpoint.directory, directory)
    for file in (Path("config.json"), *map(adapters.adapter_path, checkpoint.spec.adapters)):
        link_file(checkpoint.directory / file, directory / file)


class _TracedDecoder(nn.Module):
    """A network whose key-value cache and adapters are inputs.

    Args:
        adapted_modules: names of the modules that at least one adapter updates.
        cache_type: type of cached keys and values.
    """

    def __init__(self, network: PreTrainedModel, adapted_modules: Sequence[str], cache_type: str) -> None:
        super().__init__()
        config = network.config.get_text_config()
        self.network, self.adapted_modules, self.cache_type = network, adapted_modules, cache_type
        self.layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
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
        """Return logits and the updated cache buffers.

        Args:
            past: for each layer, the cache buffers of the keys and then those of the values.
            factors: for each adapted module, the down factor and then the up factor.
        """
        caches = [wrap_buffers(self.cache_type, buffers) for buffers in past]
        layers = [
            CacheLayer(keys, values, length, position, sliding=layer_type == "sliding_attention")
            for keys, values, layer_type in zip(caches[::2], caches[1::2], self.layer_types, strict=True)
        ]
        pairs = zip(factors[::2], factors[1::2], strict=True)
        updates = {
            name: adapters.LowRankUpdate(down=down, up=up)
            for name, (down, up) in zip(self.adapted_modules, pairs, strict=True)
        }
        with adapters.attached(self.network, updates):
            output = self.network(
                tokens,
                position_ids=(torch.arange(tokens.shape[1]) + position).expand(tokens.shape),
                past_key_values=Cache(layers=layers),
                use_cache=True,
                logits_to_keep=rows,
            )
        return (output.logits, *(buffer for cache in caches for buffer in cache.buffers))

    def example_factors(self) -> list[Tensor]:
        """Return example values of both factors of each adapted module."""
        shapes = (self.network.get_submodule(name).weight.shape for name in self.adapted_modules)
        return [factor for rows, columns in shapes for factor in (torch.zeros(RANK, columns), torch.zeros(rows, RANK))]


def _export_program(traced: _TracedDecoder, spec: ModelSpec, options: ExportOptions) -> Any:
    """Return the exported program, not yet optimized."""
    dynamic = torch.export.Dim.DYNAMIC
    past = [
        example_buffers(
            "fp16" if options.fp16_units else options.cache_type,
            batch=BATCH,
            heads=layer.kv_heads,
            capacity=CAPACITY,
            recent=RECENT,
            head_size=spec.head_size,
        )
        for layer in spec.layers
        for _ in ("key", "value")
    ]
    factors = traced.example_factors()
    tokens, rows = torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.arange(ROWS) % TOKENS
    past_names, present_names = (
        graph.cache_names(len(spec.layers), prefix, options.cache_type)
        for prefix in (graph.PAST_PREFIX, graph.PRESENT_PREFIX)
    )
    factor_names = [name for module in traced.adapted_modules for name in adapters.factor_names(module)]
    program = torch.onnx.export(
        traced,
        (tokens, torch.tensor(PAST), torch.tensor(POSITION), rows, past, factors),
        dynamo=True,
        opset_version=max(options.opset, opset_lowering.EXPORTER_MIN_OPSET),
        dynamic_shapes=(
            {0: dynamic, 1: dynamic},
            {},
            {},
            {0: dynamic},
            [[{0: dynamic, 2: dynamic} for _ in buffers] for buffers in past],
            [{index % 2: dynamic} for index in range(len(factors))],
        ),
        input_names=[graph.INPUT_IDS, graph.PAST_LENGTH, graph.POSITION, graph.ROWS, *past_names, *factor_names],
        output_names=[graph.LOGITS, *present_names],
        verbose=False,
        optimize=False,
    )
    assert program is not None
    return program


def _convert_to_fp16(network: PreTrainedModel, fp32_modules: Collection[str]) -> None:
    """Convert the parameters to fp16, except those of `fp32_modules`, whose inputs and outputs are cast instead.

    Buffers stay in fp32, because rotary frequencies need its precision.
    """
    for name, module in network.named_modules():
        if name in fp32_modules:
            module.register_forward_pre_hook(_cast_inputs_to_fp32)
            module.register_forward_hook(_cast_output_to_fp16)
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.half()


def _cast_inputs_to_fp32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


def _cast_output_to_fp16(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.half()


def _caps_attention_scores(network: PreTrainedModel) -> bool:
    """Return True if attention caps its scores (softcapping), which only the eager implementation supports."""
    return getattr(network.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _adapted_modules(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the modules that at least one adapter of the checkpoint updates."""
    updates: dict[str, LowRankUpdate] = {}
    for name in checkpoint.spec.adapters:
        updates |= adapters.read(checkpoint.directory, name)
    return list(updates)


def _add_input_defaults(model: Any, names: Sequence[str]) -> None:
    """Give the adapter inputs default values of rank 0, so that the graph computes the base model without them."""
    import numpy as np
    import onnx_ir

    inputs: Mapping[str, Any] = {value.name: value for value in model.graph.inputs}
    for name in names:
        shape = [size if isinstance(size, int) else 0 for size in inputs[name].shape]
        inputs[name].const_value = onnx_ir.tensor(np.zeros(shape, np.float32), name=name)
        model.graph.initializers[name] = inputs[name]


def _store_in_fp16(model: Any) -> None:
    """Store the matrices in fp16 and cast them to fp32 when the graph is loaded."""
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
        cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT}, name=f"{name}.widen")
        cast.outputs[0].name = f"{name}.widened"
        model.graph.initializers[tensor.name] = stored
        onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del model.graph.initializers[name]
        model.graph.insert_before(model.graph[0], [cast])


def _remove_metadata(model: Any) -> None:
    """Remove metadata about the exporting machine, so that equal checkpoints give equal bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention without repeating the key-value heads of grouped queries."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppress the exporter's warnings about optional libraries, and keep its errors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
