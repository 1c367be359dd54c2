"""A checkpoint as one GGUF file.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks of Q4_0, Q4_1 and Q8_0 as in
ggml-common.h. Their values are edgeopt's own, (code - zero_point) * scale, of which Q4_1 rounds zero_point * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edgeopt.checkpoints import adapters, modeling, quantized_matrix, safetensors_io
from edgeopt.core.artifact import link_file
from edgeopt.core.model_spec import EMBEDDING, LLAMA_BITS, LM_HEAD
from edgeopt.errors import BuildError
from edgeopt.runtimes.llamacpp import vocabulary
from edgeopt.runtimes.llamacpp.families import FAMILIES, OTHERWISE
from edgeopt.runtimes.llamacpp.layout import MODEL_FILE, adapter_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.adapters import LowRank
    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec, QuantizationScheme
    from edgeopt.core.protocols import Progress

FREQUENCIES, LONG_ROPE = "rope_freqs.weight", ("rope_factors_long.weight", "rope_factors_short.weight")
"""By what rotary frequencies are divided: at every length, and beyond and within the length of the first training."""


def build(checkpoint: Checkpoint, directory: Path, *, progress: Progress) -> None:
    """Write weights, sizes, tokenizer and adapters as GGUF, and the tokenizer itself beside them. Raises BuildError."""
    spec = checkpoint.spec
    progress(f"writing {spec.architecture} as GGUF")
    network = modeling.load(checkpoint)
    config = network.config.get_text_config().to_dict()
    _require_full_attention(config, spec)
    names = _Names(network, spec)
    in_float, path = directory / "float.gguf", directory / MODEL_FILE
    writer = gguf.GGUFWriter(in_float, names.architecture)
    _describe(writer, spec, config)
    FAMILIES[spec.architecture].tell(writer, config, spec)
    vocabulary.write(writer, checkpoint.directory, spec.vocabulary_size)
    _write(writer, _tensors(network, checkpoint, names) | _rotary_factors(network, spec))
    if spec.weight_dtype in LLAMA_BITS:
        from edgeopt.runtimes.llamacpp import quantized_types

        progress(f"rounding to {spec.weight_dtype}")
        quantized_types.rounded(in_float, path, spec.weight_dtype, _importance(network, checkpoint, names))
        in_float.unlink()
    else:
        in_float.rename(path)
    for name in spec.adapters:
        (directory / adapters.FOLDER).mkdir(exist_ok=True)
        _write_adapter(adapters.read(checkpoint.directory, name), directory / adapter_path(name), names)
    modeling.carry(checkpoint.directory, directory)
    link_file(checkpoint.directory / "config.json", directory / "config.json")


class _Names:
    """What llama.cpp calls the tensors of a network, and in which order it has their rows."""

    def __init__(self, network: PreTrainedModel, spec: ModelSpec) -> None:
        family = FAMILIES[spec.architecture]
        self.architecture = family.varied if spec.varied else family.name
        number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map = gguf.get_tensor_name_map(number, len(spec.layers))
        self._turned = _turned(network, spec) if family.paired else {}

    def of(self, module: str) -> str:
        """Of a module, without the name of a part; BuildError where llama.cpp has none."""
        name: str | None = self._map.get_name(module)
        if name is None:
            raise BuildError(f"llama.cpp has no name for {module!r}", hint="Use another runtime")
        return name

    def rows(self, module: str) -> np.ndarray | slice:
        return self._turned.get(module, slice(None))


def _require_full_attention(config: Mapping[str, Any], spec: ModelSpec) -> None:
    """BuildError where attention is windowed, which llama.cpp does not compute in these families."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < spec.context_length and not FAMILIES[spec.architecture].windowed:
        raise BuildError(
            f"llama.cpp does not compute the sliding window of {window} tokens of {spec.architecture}", hint=OTHERWISE
        )


def _describe(writer: gguf.GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """The sizes: one of each, or one a layer where they differ."""
    rope = _rope(config)

    def size(name: str) -> int | list[int]:
        sizes = [getattr(layer, name) for layer in spec.layers]
        return sizes if spec.varied else sizes[0]

    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_vocab_size(spec.vocabulary_size)
    writer.add_feed_forward_length(size("intermediate_size"))
    writer.add_head_count(size("heads"))
    writer.add_head_count_kv(size("kv_heads"))
    writer.add_key_length(spec.head_size)
    writer.add_value_length(spec.head_size)
    writer.add_rope_dimension_count(int(spec.head_size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How positions are told, in layers with full attention where those with windows have another way."""
    rope = config["rope_parameters"]
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
"""By llama.cpp's names: the values, or the bytes of the blocks of each row, and their type."""


def _write(writer: gguf.GGUFWriter, tensors: Tensors) -> None:
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(network: PreTrainedModel, checkpoint: Checkpoint, names: _Names) -> Tensors:
    spec, units = checkpoint.spec, modeling.units(network)
    rounded = quantized_matrix.rounded(safetensors_io.read_folder(checkpoint.directory))
    forms = {module: form for unit, form in spec.schemes.items() for module in units[unit]}
    found: Tensors = {}
    for key, tensor in network.state_dict().items():
        module, _, part = key.rpartition(".")
        if spec.tied_embeddings and module in units[LM_HEAD]:
            continue
        name, rows = f"{names.of(module)}.{part}", names.rows(module)
        if part == "weight" and module in rounded:
            found[name] = _packed(rounded[module], forms[module], rows)
        else:
            values = tensor.float().numpy()[rows]
            if module.endswith("norm"):
                values = values + FAMILIES[spec.architecture].norm_offset
            found[name] = _plain(values, halved=spec.weight_dtype == "fp16")
    return found


def _importance(network: PreTrainedModel, checkpoint: Checkpoint, names: _Names) -> dict[str, np.ndarray]:
    """What calibration text puts into the channels that each tensor multiplies; empty where none was read."""
    path = checkpoint.directory / modeling.IMPORTANCE
    if not path.is_file():
        return {}
    energies, modules = safetensors_io.read_arrays(path), modeling.units(network)
    if checkpoint.spec.tied_embeddings:
        modules[LM_HEAD] = modules[EMBEDDING]
    return {f"{names.of(module)}.weight": energies[unit] for unit in energies for module in modules[unit]}


def _plain(array: np.ndarray, *, halved: bool = False) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Matrices in fp16 where they are to be halved; all that is added to or multiplies channels stays in fp32."""
    if halved and array.ndim == 2:
        return array.astype(np.float16), gguf.GGMLQuantizationType.F16
    return np.ascontiguousarray(array), gguf.GGMLQuantizationType.F32


def _write_adapter(updates: Mapping[str, LowRank], path: Path, names: _Names) -> None:
    """An adapter as a file of its own; without an alpha its update is scaled by nothing more."""
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    found: Tensors = {}
    for module, update in updates.items():
        name = f"{names.of(module)}.weight"
        found[f"{name}.lora_a"] = _plain(update.down.numpy())
        found[f"{name}.lora_b"] = _plain(update.up.numpy()[names.rows(module)])
    _write(writer, found)


def _turned(network: PreTrainedModel, spec: ModelSpec) -> dict[str, np.ndarray]:
    """The rows of each query and key projection in the order in which a head's channels stand by pairs."""
    units, found = modeling.units(network), {}
    for number, layer in enumerate(spec.layers):
        query, key, _ = units[f"layers.{number}.qkv"]
        for module, heads in ((query, layer.heads), (key, layer.kv_heads)):
            rows = np.arange(heads * spec.head_size).reshape(heads, 2, spec.head_size // 2)
            found[module] = rows.swapaxes(1, 2).reshape(-1)
    return found


def _rotary_factors(network: PreTrainedModel, spec: ModelSpec) -> Tensors:
    """By what the rotary frequencies are divided where they are not the plain ones (Llama 3, Phi-3)."""
    rope = _rope(network.config.to_dict())
    if rope["rope_type"] == "longrope":
        both = (rope["long_factor"], rope["short_factor"])
        return {name: _plain(np.array(factors, np.float32)) for name, factors in zip(LONG_ROPE, both, strict=True)}
    rotary: Any = network.get_decoder().rotary_emb
    turned = next(found for name, found in rotary.named_buffers() if name in ("inv_freq", "full_attention_inv_freq"))
    plain = rope["rope_theta"] ** -(np.arange(len(turned)) / len(turned))
    factors = (plain / turned.double().numpy()).astype(np.float32)
    if np.allclose(factors, 1, rtol=1e-5):
        return {}
    if FAMILIES[spec.architecture].name != "llama" or rotary.attention_scaling != 1.0:
        raise BuildError(f"llama.cpp does not compute the rotary scaling of {spec.architecture}", hint=OTHERWISE)
    return {FREQUENCIES: _plain(factors)}


def _packed(
    matrix: QuantizedMatrix, form: QuantizationScheme, rows: np.ndarray | slice
) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The blocks of each row: scale, minimum where there is one, and codes; uint8, shape (rows, bytes)."""
    kinds = gguf.GGMLQuantizationType
    scales = matrix.scales.numpy()[rows]
    codes = matrix.codes.numpy()[rows].reshape(*scales.shape, -1)
    parts = [_bytes(scales.astype(np.float16))]
    if form.bits == 8:
        kind = kinds.Q8_0
        parts.append((codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        kind = kinds.Q4_0 if form.symmetric else kinds.Q4_1
        if not form.symmetric:
            middle = matrix.zero_points.numpy()[rows].astype(np.float32)
            parts.append(_bytes((-middle * scales).astype(np.float16)))
        half = codes.shape[-1] // 2
        parts.append(codes[..., :half] | codes[..., half:] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(len(scales), -1), kind


def _bytes(halves: np.ndarray) -> np.ndarray:
    """Numbers in fp16 as two bytes each, along a new last axis."""
    found: np.ndarray = np.ascontiguousarray(halves)[..., None].view(np.uint8)
    return found
