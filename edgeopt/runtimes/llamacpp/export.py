"""Export a checkpoint as a GGUF file.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The block layouts of Q4_0, Q4_1 and Q8_0 are
as in ggml-common.h. Quantized values stay exactly those of edgeopt, (code - zero_point) * scale, except that Q4_1
rounds zero_point * scale to fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edgeopt.checkpoints import adapters, modeling, quantized_matrix, safetensors_io
from edgeopt.core.artifact import link_file
from edgeopt.core.model_spec import EMBEDDING, LLAMA_CPP_BITS, LM_HEAD
from edgeopt.errors import BuildError
from edgeopt.runtimes.llamacpp import vocabulary
from edgeopt.runtimes.llamacpp.families import FAMILIES, OTHER_RUNTIME_HINT
from edgeopt.runtimes.llamacpp.layout import MODEL_FILE, adapter_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.adapters import LowRankUpdate
    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
    from edgeopt.core.protocols import Progress

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the divisors of the rotary frequencies."""
LONGROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors with LongRoPE's divisors for prompts beyond and within the original context length."""

Tensor = tuple[np.ndarray, gguf.GGMLQuantizationType]
"""Values of a float tensor, or the bytes of quantized blocks with shape (rows, bytes), and their type."""


def build(checkpoint: Checkpoint, directory: Path, *, progress: Progress) -> None:
    """Write weights, metadata, tokenizer and adapters as GGUF files, and link the tokenizer's own files.

    Raises:
        BuildError: if llama.cpp does not support the model.
    """
    spec = checkpoint.spec
    progress(f"writing {spec.architecture} as GGUF")
    network = modeling.load(checkpoint)
    config = network.config.get_text_config().to_dict()
    _require_supported_attention(config, spec)
    names = _TensorNames(network, spec)
    float_path, path = directory / "float.gguf", directory / MODEL_FILE
    writer = gguf.GGUFWriter(float_path, names.architecture)
    _write_sizes(writer, spec, config)
    FAMILIES[spec.architecture].write_metadata(writer, config, spec)
    vocabulary.write(writer, checkpoint.directory, spec.vocabulary_size)
    _write_tensors(writer, _weight_tensors(network, checkpoint, names) | _rope_factors(network, spec))
    if spec.weight_dtype in LLAMA_CPP_BITS:
        from edgeopt.runtimes.llamacpp import quantized_types

        progress(f"quantizing to {spec.weight_dtype}")
        quantized_types.quantize(float_path, path, spec.weight_dtype, _importance(network, checkpoint, names))
        float_path.unlink()
    else:
        float_path.rename(path)
    for name in spec.adapters:
        (directory / adapters.FOLDER).mkdir(exist_ok=True)
        _write_adapter(adapters.read(checkpoint.directory, name), directory / adapter_path(name), names)
    modeling.copy_model_files(checkpoint.directory, directory)
    link_file(checkpoint.directory / "config.json", directory / "config.json")


class _TensorNames:
    """llama.cpp's names of a network's tensors, and the row order of its query and key projections."""

    def __init__(self, network: PreTrainedModel, spec: ModelSpec) -> None:
        family = FAMILIES[spec.architecture]
        self.architecture = family.varied_name if spec.has_varied_layers else family.name
        architecture_id = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._name_map = gguf.get_tensor_name_map(architecture_id, len(spec.layers))
        self._row_orders = _interleaved_rows(network, spec) if family.interleaved_rope else {}

    def name(self, module: str) -> str:
        """Return llama.cpp's name of a module, without `.weight`. Raise BuildError if it has none."""
        name: str | None = self._name_map.get_name(module)
        if name is None:
            raise BuildError(f"llama.cpp has no name for the module {module!r}", hint=OTHER_RUNTIME_HINT)
        return name

    def row_order(self, module: str) -> np.ndarray | slice:
        """Return the index that brings the rows of a module into llama.cpp's order."""
        return self._row_orders.get(module, slice(None))


def _require_supported_attention(config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise BuildError if the model uses sliding windows in a family where llama.cpp ignores them."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < spec.context_length and not FAMILIES[spec.architecture].sliding_window:
        raise BuildError(
            f"llama.cpp does not support the sliding window of {window} tokens in {spec.architecture}",
            hint=OTHER_RUNTIME_HINT,
        )


def _write_sizes(writer: gguf.GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Write the model's sizes: one value each, or one value per layer if layers differ."""
    rope = _rope_parameters(config)

    def layer_size(name: str) -> int | list[int]:
        values = [getattr(layer, name) for layer in spec.layers]
        return values if spec.has_varied_layers else values[0]

    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_vocab_size(spec.vocabulary_size)
    writer.add_feed_forward_length(layer_size("intermediate_size"))
    writer.add_head_count(layer_size("heads"))
    writer.add_head_count_kv(layer_size("kv_heads"))
    writer.add_key_length(spec.head_size)
    writer.add_value_length(spec.head_size)
    writer.add_rope_dimension_count(int(spec.head_size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the RoPE parameters of full-attention layers; sliding-window layers may have others."""
    rope = config["rope_parameters"]
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


def _write_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, Tensor]) -> None:
    for name, (array, tensor_type) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weight_tensors(network: PreTrainedModel, checkpoint: Checkpoint, names: _TensorNames) -> dict[str, Tensor]:
    """Return all weights by llama.cpp's names, in its row order. Tied embeddings are stored once."""
    spec, units = checkpoint.spec, modeling.unit_modules(network)
    quantized = quantized_matrix.quantized_matrices(safetensors_io.read_folder(checkpoint.directory))
    schemes = {module: scheme for unit, scheme in spec.schemes.items() for module in units[unit]}
    tensors: dict[str, Tensor] = {}
    for key, tensor in network.state_dict().items():
        module, _, parameter = key.rpartition(".")
        if spec.tied_embeddings and module in units[LM_HEAD]:
            continue
        name, rows = f"{names.name(module)}.{parameter}", names.row_order(module)
        if parameter == "weight" and module in quantized:
            tensors[name] = _quantized_tensor(quantized[module], schemes[module], rows)
        else:
            values = tensor.float().numpy()[rows]
            if module.endswith("norm"):
                values = values + FAMILIES[spec.architecture].norm_offset
            tensors[name] = _float_tensor(values, fp16=spec.weight_dtype == "fp16")
    return tensors


def _importance(network: PreTrainedModel, checkpoint: Checkpoint, names: _TensorNames) -> dict[str, np.ndarray]:
    """Return E[x²] of each tensor's input channels; empty if the recipe collected none on calibration text."""
    path = checkpoint.directory / modeling.IMPORTANCE
    if not path.is_file():
        return {}
    second_moments, modules = safetensors_io.read_arrays(path), modeling.unit_modules(network)
    if checkpoint.spec.tied_embeddings:
        modules[LM_HEAD] = modules[EMBEDDING]
    return {f"{names.name(module)}.weight": second_moments[unit] for unit in second_moments for module in modules[unit]}


def _float_tensor(array: np.ndarray, *, fp16: bool = False) -> Tensor:
    """Return a float tensor. With `fp16`, matrices are halved; norms and biases stay in fp32."""
    if fp16 and array.ndim == 2:
        return array.astype(np.float16), gguf.GGMLQuantizationType.F16
    return np.ascontiguousarray(array), gguf.GGMLQuantizationType.F32


def _write_adapter(updates: Mapping[str, LowRankUpdate], path: Path, names: _TensorNames) -> None:
    """Write an adapter as its own GGUF file. An alpha of 0 tells llama.cpp not to scale the update."""
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        name = f"{names.name(module)}.weight"
        tensors[f"{name}.lora_a"] = _float_tensor(update.down.numpy())
        tensors[f"{name}.lora_b"] = _float_tensor(update.up.numpy()[names.row_order(module)])
    _write_tensors(writer, tensors)


def _interleaved_rows(network: PreTrainedModel, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Return the row order of query and key projections that interleaves the two halves of each head.

    transformers rotates channel i with channel i + head_size / 2, llama.cpp rotates adjacent channels.
    """
    units, row_orders = modeling.unit_modules(network), {}
    for index, layer in enumerate(spec.layers):
        query, key, _ = units[f"layers.{index}.qkv"]
        for module, heads in ((query, layer.heads), (key, layer.kv_heads)):
            rows = np.arange(heads * spec.head_size).reshape(heads, 2, spec.head_size // 2)
            row_orders[module] = rows.swapaxes(1, 2).reshape(-1)
    return row_orders


def _rope_factors(network: PreTrainedModel, spec: ModelSpec) -> dict[str, Tensor]:
    """Return the divisors of the rotary frequencies (Llama 3, Phi-3); empty for unscaled RoPE."""
    rope = _rope_parameters(network.config.to_dict())
    if rope["rope_type"] == "longrope":
        factors_by_name = zip(LONGROPE_FACTORS, (rope["long_factor"], rope["short_factor"]), strict=True)
        return {name: _float_tensor(np.array(factors, np.float32)) for name, factors in factors_by_name}
    rotary: Any = network.get_decoder().rotary_emb
    frequency_buffers = ("inv_freq", "full_attention_inv_freq")
    scaled = next(buffer for name, buffer in rotary.named_buffers() if name in frequency_buffers)
    unscaled = rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
    factors = (unscaled / scaled.double().numpy()).astype(np.float32)
    if np.allclose(factors, 1, rtol=1e-5):
        return {}
    if FAMILIES[spec.architecture].name != "llama" or rotary.attention_scaling != 1.0:
        raise BuildError(f"llama.cpp does not support the RoPE scaling of {spec.architecture}", hint=OTHER_RUNTIME_HINT)
    return {ROPE_FACTORS: _float_tensor(factors)}


def _quantized_tensor(matrix: QuantizedMatrix, scheme: QuantizationScheme, rows: np.ndarray | slice) -> Tensor:
    """Pack a matrix into blocks of Q8_0, Q4_0 or Q4_1: fp16 scale, fp16 minimum (Q4_1 only), codes.

    The result has shape (rows, bytes) and type uint8.
    """
    types = gguf.GGMLQuantizationType
    scales = matrix.scales.numpy()[rows]
    codes = matrix.codes.numpy()[rows].reshape(*scales.shape, -1)
    parts = [_as_bytes(scales.astype(np.float16))]
    if scheme.bits == 8:
        tensor_type = types.Q8_0
        parts.append((codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        tensor_type = types.Q4_0 if scheme.symmetric else types.Q4_1
        if not scheme.symmetric:
            zero_points = matrix.zero_points.numpy()[rows].astype(np.float32)
            parts.append(_as_bytes((-zero_points * scales).astype(np.float16)))
        half = codes.shape[-1] // 2
        parts.append(codes[..., :half] | codes[..., half:] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(len(scales), -1), tensor_type


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """View fp16 values as two bytes each, along a new last axis."""
    as_bytes: np.ndarray = np.ascontiguousarray(values)[..., None].view(np.uint8)
    return as_bytes
