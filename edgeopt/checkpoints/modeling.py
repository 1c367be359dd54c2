"""Load a checkpoint as a PyTorch network and save a network as a checkpoint, for all decoder families of transformers.

The layers of a checkpoint may differ in width, which the loader of transformers does not support. Therefore `load`
builds the network from `config.json`, cuts its matrices to the sizes in the manifest's spec and then reads the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import quantized_matrix, safetensors_io
from edgeopt.checkpoints.importing import COPIED_FILES
from edgeopt.core.artifact import link_file
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, LayerSpec, ModelSpec
from edgeopt.errors import InputError, StepError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint

WEIGHTS = "model.safetensors"
INPUT_RANGES = "input_ranges.json"
"""File with the uint8 scale and zero-point of each unit's input, by unit name."""
IMPORTANCE = Path("importance") / "matrix.safetensors"
"""File with the mean x² of each unit's input channels, float32 (columns,), by unit name."""
KV_CACHE = "kv_cache.json"
"""File with the scales of keys and values: `{"qmax", "scales": {"k_scales", "v_scales"}}`, one row per layer."""
PER_LAYER_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Keys of `config.json` whose value is a list with one entry per layer."""
SEPARATE_MODULES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Modules of each unit in a decoder layer, in families with separate projections."""
FUSED_MODULES = {**SEPARATE_MODULES, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
"""Modules of each unit in families with fused projections (Phi-3)."""


def write_random_llama(spec: ModelSpec, directory: Path) -> None:
    """Write a Llama with random weights in Hugging Face layout. Every layer has the sizes of the first in `spec`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    first = spec.layers[0]
    config = LlamaConfig(
        vocab_size=spec.vocabulary_size,
        hidden_size=spec.hidden_size,
        intermediate_size=first.intermediate_size,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=first.heads,
        num_key_value_heads=first.kv_heads,
        head_dim=spec.head_size,
        max_position_embeddings=spec.context_length,
        tie_word_embeddings=spec.tied_embeddings,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)


def load(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the network of a checkpoint in evaluation mode, dequantized to float32. Adapters are not applied.

    Raises:
        InputError: a weight is missing or has another shape, or a file is not valid safetensors.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    spec = checkpoint.spec
    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    with no_init_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    default_sizes = ModelSpec.from_hf_config(config.to_dict()).layers
    if spec.layers != default_sizes:
        for layer, sizes, default in zip(layers(network), spec.layers, default_sizes, strict=True):
            if sizes != default:
                _resize(layer, sizes, spec.head_size)
    state = quantized_matrix.dequantize(safetensors_io.read_folder(checkpoint.directory))
    _add_biases(network, state)
    expected = network.state_dict()
    if state.keys() - expected.keys():
        state = _rename_legacy_weights(network, state, expected)
    if spec.tied_embeddings:
        _share_tied(network, state)
    wrong_shape = [n for n, t in state.items() if n in expected and expected[n].shape != t.shape]
    missing = sorted(expected.keys() - state.keys())
    if wrong_shape or missing:
        name = (wrong_shape or missing)[0]
        problem = f"must have the shape {tuple(expected[name].shape)} of config.json" if wrong_shape else "is missing"
        raise InputError(
            f"the weight {name!r} {problem}",
            location=str(checkpoint.directory),
            hint="Use the weights that belong to this config.json",
        )
    network.load_state_dict(state, strict=False)
    network.tie_weights()
    return network.eval().requires_grad_(False)


def save(
    network: PreTrainedModel,
    directory: Path,
    source: Checkpoint,
    spec: ModelSpec,
    quantized: Mapping[str, QuantizedMatrix] | None = None,
) -> None:
    """Write the weights of `network`, a `config.json` for `spec` and the tokenizer of `source` into `directory`.

    Weights are float32, except for the modules in `quantized`.
    """
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    for name, matrix in (quantized or {}).items():
        del weights[f"{name}.weight"]
        weights |= matrix.tensors(name)
    if spec.tied_embeddings:
        weights.pop("lm_head.weight", None)
    safetensors_io.write(weights, directory / WEIGHTS)
    write_config(network.config.to_dict(), spec, directory)
    copy_model_files(source.directory, directory)


def write_config(config: Mapping[str, Any], spec: ModelSpec, directory: Path) -> None:
    """Write `config` with the sizes of `spec` as `config.json`, with the largest MLP size if layers differ."""
    first = spec.layers[0]
    text: dict[str, Any] = {
        "num_hidden_layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "intermediate_size": max(layer.intermediate_size for layer in spec.layers),
        "head_dim": spec.head_size,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    if spec.hidden_size % first.heads == 0:  # transformers rejects other head counts
        text |= {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads}
    text |= {key: config[key][: len(spec.layers)] for key in PER_LAYER_KEYS if config.get(key)}
    document = {**config, **text, "dtype": "float32", "architectures": [spec.architecture]}
    document.pop("_name_or_path", None)  # a local path, which would change the digest
    (directory / "config.json").write_text(json.dumps(document, indent=1, sort_keys=True, default=str) + "\n")


def input_ranges(checkpoint: Checkpoint) -> dict[str, tuple[float, int]]:
    """Return (scale, zero-point) by unit name, or an empty mapping if the checkpoint has no calibrated input ranges."""
    path = checkpoint.directory / INPUT_RANGES
    return json.loads(path.read_text()) if path.is_file() else {}


def copy_model_files(source: Path, directory: Path) -> None:
    """Copy the tokenizer and the generation settings from one model folder to another."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def link_checkpoint(source: Checkpoint, directory: Path) -> None:
    """Link the files of a checkpoint except `artifacts/` into another folder with `link_file`."""
    for record in source.files:
        if not record.path.startswith("artifacts/"):
            link_file(source.directory / record.path, directory / record.path)


def layers(network: PreTrainedModel) -> Any:
    """Return the decoder layers, an nn.ModuleList. Model families share attribute names but no base class."""
    return network.get_decoder().layers


def norms(network: PreTrainedModel) -> list[Any]:
    """Return the norms over hidden channels, in the layers and after the last one, without norms inside attention."""
    inside = [child for layer in layers(network) for child in layer.children()]
    return [module for module in (*inside, network.get_decoder().norm) if hasattr(module, "weight")]


def unit_modules(network: PreTrainedModel) -> dict[str, list[str]]:
    """Return the module names of each unit, in the order of their rows in the stacked matrix."""
    names = {id(module): name for name, module in network.named_modules()}
    by_unit: dict[str, list[str]] = {}
    for index, layer in enumerate(layers(network)):
        modules = FUSED_MODULES if hasattr(layer.self_attn, "qkv_proj") else SEPARATE_MODULES
        for unit in UNITS:
            by_unit[f"layers.{index}.{unit}"] = [f"{names[id(layer)]}.{module}" for module in modules[unit]]
    by_unit[LM_HEAD] = [names[id(network.get_output_embeddings())]]
    by_unit[EMBEDDING] = [names[id(network.get_input_embeddings())]]
    return by_unit


def untie(network: PreTrainedModel) -> None:
    """Give lm_head its own copy of the embedding table."""
    from torch import nn

    network.config.tie_word_embeddings = False
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def keep_rows(linear: nn.Linear, index: Tensor) -> None:
    """Keep the output channels in `index` (int64, shape (channels,)), in this order."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight[index].clone(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[index].clone(), requires_grad=False)
    linear.out_features = len(index)


def keep_columns(linear: nn.Linear, index: Tensor) -> None:
    """Keep the input channels in `index` (int64, shape (channels,)), in this order."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight[:, index].clone(), requires_grad=False)
    linear.in_features = len(index)


def keep_channels(mlp: Any, index: Tensor) -> None:
    """Keep the MLP channels in `index` (int64, shape (channels,)) in all three matrices of a gated MLP."""
    keep_rows(mlp.gate_proj, index)
    keep_rows(mlp.up_proj, index)
    keep_columns(mlp.down_proj, index)


def keep_heads(attention: Any, query: Tensor, key_value: Tensor, *, groups: int) -> None:
    """Keep the rows `query` of the query projection and `key_value` of the key and value projections.

    Args:
        attention: attention module of a layer.
        query: row indices, int64, shape (rows,).
        key_value: row indices, int64, shape (rows,).
        groups: query heads per key-value head after the cut.
    """
    keep_rows(attention.q_proj, query)
    keep_rows(attention.k_proj, key_value)
    keep_rows(attention.v_proj, key_value)
    keep_columns(attention.o_proj, query)
    attention.num_key_value_groups = groups


def keep_layers(network: PreTrainedModel, indices: Sequence[int]) -> None:
    """Keep the decoder layers with these indices, in this order."""
    from torch import nn

    network.get_decoder().layers = nn.ModuleList([layers(network)[n] for n in indices])
    network.config.num_hidden_layers = len(indices)
    for key in PER_LAYER_KEYS:
        if entries := getattr(network.config, key, None):
            setattr(network.config, key, [entries[n] for n in indices])


def require_separate_projections(network: PreTrainedModel, step: str) -> None:
    """Raise StepError for families that fuse the gate and up or the query, key and value projections (Phi-3)."""
    layer = layers(network)[0]
    if not (hasattr(layer.mlp, "gate_proj") and hasattr(layer.self_attn, "q_proj")):
        raise StepError(
            f"{step} needs separate projections, got {type(network).__name__} with fused projections",
            hint="Use quantize or lora for this family",
        )


def spec_of(network: PreTrainedModel, base: ModelSpec) -> ModelSpec:
    """Return `base` with the layer sizes of a network whose layers were cut or removed."""
    sizes = tuple(
        LayerSpec(
            intermediate_size=layer.mlp.down_proj.in_features,
            heads=layer.self_attn.q_proj.out_features // base.head_size,
            kv_heads=layer.self_attn.k_proj.out_features // base.head_size,
        )
        for layer in layers(network)
    )
    return base.with_layers(sizes)


def _resize(layer: Any, sizes: LayerSpec, head_size: int) -> None:
    """Cut the matrices of a layer to `sizes`. Which channels remain is irrelevant: `load` reads the weights later."""
    import torch

    channels = torch.arange(sizes.intermediate_size)
    query, key_value = torch.arange(sizes.heads * head_size), torch.arange(sizes.kv_heads * head_size)
    keep_channels(layer.mlp, channels)
    keep_heads(layer.self_attn, query, key_value, groups=sizes.heads // sizes.kv_heads)


def _add_biases(network: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Add a bias to every linear layer that has one in `state` but not in the model family."""
    from torch import nn

    for name, module in network.named_modules():
        bias = state.get(f"{name}.bias")
        if isinstance(module, nn.Linear) and module.bias is None and bias is not None:
            module.bias = nn.Parameter(bias)


def _rename_legacy_weights(
    network: PreTrainedModel, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights with legacy names replaced by current names, using the mapping of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [rule for rule in get_model_conversion_mapping(network) if isinstance(rule, WeightRenaming)]
    renamed = dict(state)
    for name in state.keys() - expected.keys():
        candidates = (rule.rename_source_key(name)[0] for rule in renamings)
        renamed[next((candidate for candidate in candidates if candidate in expected), name)] = renamed.pop(name)
    return renamed


def _share_tied(network: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Add a tied table under the name that is missing. Some checkpoints store it under one of its two names only."""
    names = {id(module): name for name, module in network.named_modules()}
    tables = network.get_input_embeddings(), network.get_output_embeddings()
    first, second = (f"{names[id(table)]}.weight" for table in tables)
    for name, other in ((first, second), (second, first)):
        if name not in state and other in state:
            state[name] = state[other]
