"""A checkpoint as a torch network and back, for every decoder family of transformers.

Compression and runtimes share this file because layers of one checkpoint may differ in width: the
library's own loader cannot express that, so a network is built from `config.json`, its matrices are
cut to the sizes in the manifest's spec, and only then the weights are read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import quantized_matrix, safetensors_io
from edgeopt.checkpoints.importing import CARRIED_FILES
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
"""Scale and zero-point of each unit's input in unsigned 8 bits, by the unit's name."""
IMPORTANCE = Path("importance") / "matrix.safetensors"
"""Mean x² of each unit's input channels, float32 (columns,), by the unit's name."""
KV_CACHE = "kv_cache.json"
"""Scales of keys and values, `{"qmax", "scales": {"k_scales", "v_scales"}}`, one row a layer."""
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Lists in `config.json` with one entry a layer."""
SEPARATE: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Modules of each unit in a decoder layer."""
FUSED = {**SEPARATE, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
"""The same in families that stack them in one matrix (Phi-3)."""


def initialize(spec: ModelSpec, directory: Path) -> None:
    """Write a Llama of random weights, whose layers are all as the first of `spec`, in Hugging Face layout."""
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
    """The network in evaluation mode, float32, with per-layer sizes as the spec says.

    Raises InputError where weights are missing, of other shapes, or not safetensors.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    spec = checkpoint.spec
    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    with no_init_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    built = ModelSpec.from_hf_config(config.to_dict()).layers
    if spec.layers != built:
        for layer, sizes, present in zip(layers(network), spec.layers, built, strict=True):
            if sizes != present:
                _resize(layer, sizes, spec.head_size)
    state = quantized_matrix.dequantize(safetensors_io.read_folder(checkpoint.directory))
    _make_biases(network, state)
    own = network.state_dict()
    if state.keys() - own.keys():
        state = _in_present_names(network, state, own)
    if spec.tied_embeddings:
        _share_tied(network, state)
    wrong = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    missing = sorted(own.keys() - state.keys())
    if wrong or missing:
        raise InputError(
            f"weight {(wrong or missing)[0]!r} {'has another shape than config.json says' if wrong else 'is missing'}",
            location=str(checkpoint.directory),
            hint="Give the weights that belong to this config.json",
        )
    network.load_state_dict(state, strict=False)
    network.tie_weights()
    return network.eval().requires_grad_(False)


def save(
    network: PreTrainedModel,
    directory: Path,
    source: Checkpoint,
    spec: ModelSpec,
    rounded: Mapping[str, QuantizedMatrix] | None = None,
) -> None:
    """Write weights (float32, or on a grid for the modules in `rounded`), `config.json` and the source's tokenizer."""
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    for name, matrix in (rounded or {}).items():
        del weights[f"{name}.weight"]
        weights |= matrix.tensors(name)
    if spec.tied_embeddings:
        weights.pop("lm_head.weight", None)
    safetensors_io.write(weights, directory / WEIGHTS)
    write_config(network.config.to_dict(), spec, directory)
    carry(source.directory, directory)


def write_config(config: Mapping[str, Any], spec: ModelSpec, directory: Path) -> None:
    """`config.json` that agrees with `spec` as far as it can; where layers differ, the spec alone is right."""
    first = spec.layers[0]
    text: dict[str, Any] = {
        "num_hidden_layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "intermediate_size": max(layer.intermediate_size for layer in spec.layers),
        "head_dim": spec.head_size,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    if spec.hidden_size % first.heads == 0:  # other numbers of heads do not pass transformers' validation
        text |= {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads}
    text |= {key: config[key][: len(spec.layers)] for key in PER_LAYER if config.get(key)}
    document = {**config, **text, "dtype": "float32", "architectures": [spec.architecture]}
    document.pop("_name_or_path", None)  # where the weights lay: a copy elsewhere gives the same bytes
    (directory / "config.json").write_text(json.dumps(document, indent=1, sort_keys=True, default=str) + "\n")


def input_ranges(checkpoint: Checkpoint) -> dict[str, tuple[float, int]]:
    """What INPUT_RANGES says, nothing where inputs have no ranges from calibration text."""
    path = checkpoint.directory / INPUT_RANGES
    return json.loads(path.read_text()) if path.is_file() else {}


def carry(source: Path, directory: Path) -> None:
    """Copy the tokenizer and generation settings from one checkpoint folder to another."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def link(source: Checkpoint, directory: Path) -> None:
    """The checkpoint's files in another folder, as hard links where the file system allows."""
    for record in source.files:
        if record.path.startswith("artifacts/"):
            continue
        link_file(source.directory / record.path, directory / record.path)


def layers(network: PreTrainedModel) -> Any:
    """The decoder layers in order, an nn.ModuleList; families name what is inside alike, but share no type."""
    return network.get_decoder().layers


def norms(network: PreTrainedModel) -> list[Any]:
    """The norms over hidden channels, in the layers and after them; those inside attention are over heads."""
    inside = [child for layer in layers(network) for child in layer.children()]
    return [module for module in (*inside, network.get_decoder().norm) if hasattr(module, "weight")]


def units(network: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the modules of each unit of a spec, in the order of their rows."""
    names = {id(module): name for name, module in network.named_modules()}
    found: dict[str, list[str]] = {}
    for number, layer in enumerate(layers(network)):
        modules = FUSED if hasattr(layer.self_attn, "qkv_proj") else SEPARATE
        for unit in UNITS:
            found[f"layers.{number}.{unit}"] = [f"{names[id(layer)]}.{module}" for module in modules[unit]]
    found[LM_HEAD] = [names[id(network.get_output_embeddings())]]
    found[EMBEDDING] = [names[id(network.get_input_embeddings())]]
    return found


def untie(network: PreTrainedModel) -> None:
    """Give lm_head a table of its own, equal to the embedding."""
    from torch import nn

    network.config.tie_word_embeddings = False
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def keep_rows(linear: nn.Linear, index: Tensor) -> None:
    """Keep the output channels in `index` (int64, shape (kept,)), in that order."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight[index].clone(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[index].clone(), requires_grad=False)
    linear.out_features = len(index)


def keep_columns(linear: nn.Linear, index: Tensor) -> None:
    """Keep the input channels in `index` (int64, shape (kept,)), in that order."""
    from torch import nn

    linear.weight = nn.Parameter(linear.weight[:, index].clone(), requires_grad=False)
    linear.in_features = len(index)


def keep_channels(mlp: Any, index: Tensor) -> None:
    """Keep the MLP channels in `index` in all three matrices of a gated MLP."""
    keep_rows(mlp.gate_proj, index)
    keep_rows(mlp.up_proj, index)
    keep_columns(mlp.down_proj, index)


def keep_heads(attention: Any, query: Tensor, key_value: Tensor, *, groups: int) -> None:
    """Keep rows `query` of the query and `key_value` of the key and value projections.

    `groups` is how many query heads share one key-value head afterwards.
    """
    keep_rows(attention.q_proj, query)
    keep_rows(attention.k_proj, key_value)
    keep_rows(attention.v_proj, key_value)
    keep_columns(attention.o_proj, query)
    attention.num_key_value_groups = groups


def keep_layers(network: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep the decoder layers with these numbers, in this order."""
    from torch import nn

    network.get_decoder().layers = nn.ModuleList([layers(network)[n] for n in kept])
    network.config.num_hidden_layers = len(kept)
    for key in PER_LAYER:
        if entries := getattr(network.config, key, None):
            setattr(network.config, key, [entries[n] for n in kept])


def require_separate_projections(network: PreTrainedModel, step: str) -> None:
    """StepError for families that fuse gate with up or the three attention projections (Phi-3)."""
    layer = layers(network)[0]
    if not (hasattr(layer.mlp, "gate_proj") and hasattr(layer.self_attn, "q_proj")):
        raise StepError(
            f"{type(network).__name__} fuses its projections, which {step} cannot cut",
            hint="Use quantize or lora for this family",
        )


def spec_of(network: PreTrainedModel, base: ModelSpec) -> ModelSpec:
    """The spec of a network whose layers were cut or dropped, other fields as in `base`."""
    found = tuple(
        LayerSpec(
            intermediate_size=layer.mlp.down_proj.in_features,
            heads=layer.self_attn.q_proj.out_features // base.head_size,
            kv_heads=layer.self_attn.k_proj.out_features // base.head_size,
        )
        for layer in layers(network)
    )
    return base.with_layers(found)


def _resize(layer: Any, sizes: LayerSpec, head_size: int) -> None:
    """Cut a layer's matrices to `sizes`; which channels remain does not matter before weights are read."""
    import torch

    channels = torch.arange(sizes.intermediate_size)
    query, key_value = torch.arange(sizes.heads * head_size), torch.arange(sizes.kv_heads * head_size)
    keep_channels(layer.mlp, channels)
    keep_heads(layer.self_attn, query, key_value, groups=sizes.heads // sizes.kv_heads)


def _make_biases(network: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give linear modules the biases that the weights have beyond those of the family."""
    from torch import nn

    for name, module in network.named_modules():
        bias = state.get(f"{name}.bias")
        if isinstance(module, nn.Linear) and module.bias is None and bias is not None:
            module.bias = nn.Parameter(bias)


def _in_present_names(
    network: PreTrainedModel, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights that a family once called otherwise under the names of now, of which transformers keeps a list."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [known for known in get_model_conversion_mapping(network) if isinstance(known, WeightRenaming)]
    found = dict(state)
    for name in state.keys() - own.keys():
        renamed = (known.rename_source_key(name)[0] for known in renamings)
        found[next((other for other in renamed if other in own), name)] = found.pop(name)
    return found


def _share_tied(network: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Some tied checkpoints store the shared table under one of its two names only."""
    names = {id(module): name for name, module in network.named_modules()}
    tables = network.get_input_embeddings(), network.get_output_embeddings()
    first, second = (f"{names[id(table)]}.weight" for table in tables)
    for name, other in ((first, second), (second, first)):
        if name not in state and other in state:
            state[name] = state[other]
