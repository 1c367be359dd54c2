"""Describe a decoder-only model without its weights: the sizes of every layer and the storage of weights.

Steps predict their effect on a spec by arithmetic. Impossible recipes are rejected and sizes are predicted before any
tensor is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeopt.errors import InputError

_ALTERNATIVE_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("ffn_dim", "n_inner"),
    "max_position_embeddings": ("n_positions",),
}
"""Alternative keys for sizes in the `config.json` of older model families."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Sizes of one decoder layer: MLP channels, query heads and key-value heads."""

    intermediate_size: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationScheme:
    """Integer storage of one matrix, with a scale for each block along the input dimension.

    Attributes:
        bits: bits of each integer weight.
        block_size: weights that share a scale.
        symmetric: True for a zero-point in the middle of the integer range, False for a stored zero-point per block.
        inputs: precision of the activations that the matrix multiplies: `float`, or 8 bits with a range per call
            (`dynamic`) or from calibration text (`static`). 8-bit activations need 8-bit weights with one block per
            row.
        bias: True if each output channel has a bias that corrects the mean rounding error.
    """

    bits: int
    block_size: int
    symmetric: bool
    inputs: str = "float"
    bias: bool = False

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix: packed integers, fp16 scales, optional zero-points and optional fp32 biases.

        With 8-bit activations, each output channel has an fp32 scale and a one-byte zero-point.
        """
        if self.inputs != "float":
            return rows * (columns + 5)
        blocks = -(-columns // self.block_size)
        packed = rows * blocks * self.block_size * self.bits // 8
        zero_points = 0 if self.symmetric else rows * -(-blocks * self.bits // 8)
        return packed + 2 * rows * blocks + zero_points + (4 * rows if self.bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheScheme:
    """Integer storage of the KV cache: symmetric, with a scale per tensor or per channel."""

    bits: int
    per_channel: bool


LLAMA_CPP_BITS: Mapping[str, float] = {
    **{"Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.68, "Q4_K_M": 4.84, "Q4_K_S": 4.58, "Q4_0": 4.55, "IQ4_XS": 4.31},
    **{"Q3_K_M": 3.91, "Q2_K": 3.35},
}
"""Approximate bits per weight of llama.cpp's own quantization types, as llama.cpp lists them for Llama 2 7B."""
DTYPE_BITS: Mapping[str, float] = {"fp32": 32, "fp16": 16, **LLAMA_CPP_BITS}
"""Bits per weight of every weight type."""
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Projections of each unit. A unit is the group of matrices in a layer that read the same input and share a scheme."""
UNITS = tuple(PROJECTIONS)
"""Units of a decoder layer in the order of computation."""
LM_HEAD, EMBEDDING = "lm_head", "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Unmerged LoRA adapter: W + up · down with inner dimension `rank` for each projection in `targets`."""

    rank: int
    targets: tuple[str, ...]

    def size_bytes(self, unit: str, rows: int, columns: int) -> int:
        """Return the bytes of the unit's updates in an engine: fp32, block-diagonal for the fused matrix `qkv`."""
        total_rank = self.rank * sum(target in self.targets for target in PROJECTIONS[unit])
        return 4 * total_rank * (columns + (rows // 2 if unit == "gate_up" else rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a decoder-only transformer.

    Attributes:
        tied_embeddings: True if embedding and lm_head share one table.
        weight_dtype: storage type of matrices without a scheme: fp32, fp16, or a type of llama.cpp such as Q4_K_M.
        schemes: scheme of each quantized unit, by name: `layers.<index>.<unit>`, `lm_head` or `embedding`.
        kv_cache: scheme of keys and values; None for float.
        adapters: adapters by name, which are not merged into the weights. Each request may select one.
        sparsity: pattern of zero weights in the layers: `dense`, `unstructured` or `2:4`. Zeros are stored as well.
    """

    architecture: str
    vocabulary_size: int
    hidden_size: int
    head_size: int
    context_length: int
    tied_embeddings: bool
    layers: tuple[LayerSpec, ...]
    weight_dtype: str = "fp32"
    schemes: Mapping[str, QuantizationScheme] = field(default_factory=dict)
    kv_cache: KvCacheScheme | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    sparsity: str = "dense"

    @property
    def has_varied_layers(self) -> bool:
        """Return True if layers differ in size."""
        return len(set(self.layers)) > 1

    @property
    def parameters(self) -> int:
        """Return the number of parameters of matrices and norms, without biases. Tied tables count once."""
        tables = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return tables + sum(self.layer_parameters(layer) for layer in self.layers) + self.hidden_size

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of every unit by name, with its matrices stacked along the output dimension.

        Tied tables are listed under both names.
        """
        shapes: dict[str, tuple[int, int]] = {}
        for index, layer in enumerate(self.layers):
            query, key_value = layer.heads * self.head_size, layer.kv_heads * self.head_size
            unit_shapes = {
                "qkv": (query + 2 * key_value, self.hidden_size),
                "o": (self.hidden_size, query),
                "gate_up": (2 * layer.intermediate_size, self.hidden_size),
                "down": (self.hidden_size, layer.intermediate_size),
            }
            shapes |= {f"layers.{index}.{unit}": unit_shapes[unit] for unit in UNITS}
        table = (self.vocabulary_size, self.hidden_size)
        return {**shapes, LM_HEAD: table, EMBEDDING: table}

    def size_bytes(self, name: str) -> int:
        """Return the bytes that an engine stores for the matrices of the unit `name`."""
        rows, columns = self.matrices[name]
        scheme = self.schemes.get(name)
        if scheme is None:
            return int(rows * columns * DTYPE_BITS[self.weight_dtype] / 8)
        return scheme.size_bytes(rows, columns)

    def adapter_bytes(self, name: str) -> int:
        """Return the bytes that an engine stores for the adapter `name`."""
        return sum(
            self.adapters[name].size_bytes(unit.rpartition(".")[2], *shape)
            for unit, shape in self.matrices.items()
            if unit not in (LM_HEAD, EMBEDDING)
        )

    @property
    def in_fp32(self) -> ModelSpec:
        """Return the spec with fp32 weights and an unquantized KV cache."""
        return replace(self, weight_dtype="fp32", schemes={}, kv_cache=None)

    @property
    def bits_per_weight(self) -> float:
        """Return the mean bits per weight, including scales and zero-points. A tied table counts once."""
        stored = [name for name in self.matrices if name != EMBEDDING or not self.tied_embeddings]
        weights = sum(math.prod(self.matrices[name]) for name in stored)
        return 8 * sum(map(self.size_bytes, stored)) / weights

    def layer_parameters(self, layer: LayerSpec) -> int:
        """Return the number of parameters of one layer, without biases."""
        attention = 2 * self.hidden_size * self.head_size * (layer.heads + layer.kv_heads)
        mlp = 3 * self.hidden_size * layer.intermediate_size
        return attention + mlp + 2 * self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """Return the spec in plain JSON types, with the keys of sealed manifests."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["layers"] = [{n: getattr(layer, n) for n in layer.__slots__} for layer in self.layers]
        schemes = fields.pop("schemes").items()  # sealed manifests use the key "grids"
        fields["grids"] = {name: {n: getattr(scheme, n) for n in scheme.__slots__} for name, scheme in schemes}
        if self.kv_cache is not None:
            fields["kv_cache"] = {n: getattr(self.kv_cache, n) for n in self.kv_cache.__slots__}
        if self.adapters:
            fields["adapters"] = {name: {n: getattr(a, n) for n in a.__slots__} for name, a in self.adapters.items()}
        else:
            del fields["adapters"]  # keeps the digest of manifests from versions without adapters
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read the output of `to_json`."""
        fields = dict(data)
        fields["layers"] = tuple(LayerSpec(**layer) for layer in fields["layers"])
        schemes = fields.pop("grids").items()
        fields["schemes"] = {name: QuantizationScheme(**scheme) for name, scheme in schemes}
        if fields["kv_cache"] is not None:
            fields["kv_cache"] = KvCacheScheme(**fields["kv_cache"])
        adapters = fields.get("adapters", {}).items()
        fields["adapters"] = {name: Adapter(rank=a["rank"], targets=tuple(a["targets"])) for name, a in adapters}
        return cls(**fields)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], location: str = "config.json") -> ModelSpec:
        """Read the spec from a Hugging Face `config.json`.

        Raises:
            InputError: the config is not a JSON object or does not describe a decoder-only language model.
        """
        if not isinstance(config, Mapping):
            raise InputError("the file must contain a JSON object", location=location, hint="Copy the file again")
        architecture = (config.get("architectures") or ["?"])[0]
        text = _with_standard_keys(config.get("text_config") or config)
        required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        missing = [key for key in required if not isinstance(text.get(key), int) or text[key] < 1]
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")) or missing:
            without = f" without {', '.join(missing)}" if missing else ""
            raise InputError(
                f"the model must be a decoder-only language model, got the architecture {architecture!r}{without}",
                location=location,
                hint="Use a model whose architecture ends in ForCausalLM, such as Llama, Qwen, Gemma or Phi",
            )
        heads = text["num_attention_heads"]
        layer = LayerSpec(
            intermediate_size=text["intermediate_size"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
        )
        return cls(
            architecture=architecture,
            vocabulary_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            head_size=text.get("head_dim") or text["hidden_size"] // heads,
            context_length=text.get("max_position_embeddings", 2048),
            tied_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
            layers=(layer,) * text["num_hidden_layers"],
        )

    def with_layers(self, layers: tuple[LayerSpec, ...]) -> ModelSpec:
        """Return the spec with other layers."""
        return replace(self, layers=layers)


def _with_standard_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with its sizes under the keys that most model families use."""
    standard = dict(config)
    for key, alternatives in _ALTERNATIVE_KEYS.items():
        values = [config[alternative] for alternative in alternatives if config.get(alternative) is not None]
        if standard.get(key) is None and values:
            standard[key] = values[0]
    if standard.get("intermediate_size") is None and isinstance(config.get("n_embd"), int):
        standard["intermediate_size"] = 4 * config["n_embd"]  # the default of GPT-2
    return standard
