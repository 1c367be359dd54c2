"""What a decoder-only model is, without its weights: sizes of every layer and how weights are stored.

Steps predict their effect on a spec by arithmetic alone, so an impossible recipe is refused and a
size estimated before any tensor is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeopt.errors import InputError

_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("ffn_dim", "n_inner"),
    "max_position_embeddings": ("n_positions",),
}
"""What older families call the sizes in their `config.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Sizes of one decoder layer: MLP channels, query heads and key-value heads."""

    intermediate_size: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationScheme:
    """How one matrix is stored: whole numbers of `bits`, with a scale for each block along the input side.

    A symmetric grid has its zero in the middle, another one stores a zero-point for each block.

    Attributes:
        inputs: how an engine takes what the matrix is multiplied with: in `float`, or in 8 bits with a range of
            each call (`dynamic`) or of calibration text (`static`); for 8 bits with one block a row alone.
        bias: whether each output channel has a constant that makes up for the mean of what rounding changed.
    """

    bits: int
    block_size: int
    symmetric: bool
    inputs: str = "float"
    bias: bool = False

    def size_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix: packed integers, fp16 scales, and zero-points and fp32 biases where it has them.

        For inputs in 8 bits each output channel has a scale in fp32 and a zero-point of one byte.
        """
        if self.inputs != "float":
            return rows * (columns + 5)
        blocks = -(-columns // self.block_size)
        packed = rows * blocks * self.block_size * self.bits // 8
        zero_points = 0 if self.symmetric else rows * -(-blocks * self.bits // 8)
        return packed + 2 * rows * blocks + zero_points + (4 * rows if self.bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheScheme:
    """How keys and values are stored: symmetric whole numbers of `bits`, a scale for each tensor or each channel."""

    bits: int
    per_channel: bool


LLAMA_CPP_BITS: Mapping[str, float] = {
    **{"Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.68, "Q4_K_M": 4.84, "Q4_K_S": 4.58, "Q4_0": 4.55, "IQ4_XS": 4.31},
    **{"Q3_K_M": 3.91, "Q2_K": 3.35},
}
"""About how many bits a weight takes in what llama.cpp rounds to by itself: those that it lists for Llama 2 7B."""
DTYPE_BITS: Mapping[str, float] = {"fp32": 32, "fp16": 16, **LLAMA_CPP_BITS}
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
UNITS = tuple(PROJECTIONS)
"""Matrices of a decoder layer that read the same input, which share a grid: in the order of computation."""
LM_HEAD, EMBEDDING = "lm_head", "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Low-rank updates that stand beside the weights, W + up · down with `rank` rows in between, for `targets`."""

    rank: int
    targets: tuple[str, ...]

    def size_bytes(self, unit: str, rows: int, columns: int) -> int:
        """Bytes of the unit's updates in an engine: fp32, block-diagonal where its matrices are one (qkv)."""
        ranks = self.rank * sum(target in self.targets for target in PROJECTIONS[unit])
        return 4 * ranks * (columns + (rows // 2 if unit == "gate_up" else rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a decoder-only transformer.

    Attributes:
        weight_dtype: the type in which an engine stores matrices that have no grid: fp32, fp16, or what llama.cpp
            rounds them to by itself, such as Q4_K_M.
        grids: the grid of each quantized unit, named `layers.<number>.<unit>`, `lm_head` or `embedding`.
        kv_cache: the grid of keys and values; None where they stay in float.
        adapters: updates by name, of which each request may choose one; none is part of the weights.
        sparsity: the pattern in which weights of the layers are zero: `dense`, `unstructured` or `2:4`. They are
            stored all the same.
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
    def varied(self) -> bool:
        """Whether layers differ in size."""
        return len(set(self.layers)) > 1

    @property
    def parameters(self) -> int:
        """Weights of the matrices and norms without biases, each table counted once where it is tied."""
        tables = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return tables + sum(self.layer_parameters(layer) for layer in self.layers) + self.hidden_size

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every unit, its matrices stacked along the output side; tied tables stand twice."""
        shapes: dict[str, tuple[int, int]] = {}
        for number, layer in enumerate(self.layers):
            query, key_value = layer.heads * self.head_size, layer.kv_heads * self.head_size
            sides = {
                "qkv": (query + 2 * key_value, self.hidden_size),
                "o": (self.hidden_size, query),
                "gate_up": (2 * layer.intermediate_size, self.hidden_size),
                "down": (self.hidden_size, layer.intermediate_size),
            }
            shapes |= {f"layers.{number}.{unit}": sides[unit] for unit in UNITS}
        table = (self.vocabulary_size, self.hidden_size)
        return {**shapes, LM_HEAD: table, EMBEDDING: table}

    def size_bytes(self, name: str) -> int:
        """Bytes that an engine stores for the matrices of the unit `name`."""
        rows, columns = self.matrices[name]
        grid = self.schemes.get(name)
        return (
            int(rows * columns * DTYPE_BITS[self.weight_dtype] / 8) if grid is None else grid.size_bytes(rows, columns)
        )

    def adapter_bytes(self, name: str) -> int:
        """Bytes that an engine stores for the adapter `name`."""
        return sum(
            self.adapters[name].size_bytes(unit.rpartition(".")[2], *sides)
            for unit, sides in self.matrices.items()
            if unit not in (LM_HEAD, EMBEDDING)
        )

    @property
    def in_fp32(self) -> ModelSpec:
        """The same sizes, and the same adapters, with everything stored in fp32."""
        return replace(self, weight_dtype="fp32", schemes={}, kv_cache=None)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of the matrices' weights, scales and zero-points counted; a tied table counts once."""
        stored = [name for name in self.matrices if name != EMBEDDING or not self.tied_embeddings]
        weights = sum(math.prod(self.matrices[name]) for name in stored)
        return 8 * sum(map(self.size_bytes, stored)) / weights

    def layer_parameters(self, layer: LayerSpec) -> int:
        attention = 2 * self.hidden_size * self.head_size * (layer.heads + layer.kv_heads)
        mlp = 3 * self.hidden_size * layer.intermediate_size
        return attention + mlp + 2 * self.hidden_size

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["layers"] = [{n: getattr(layer, n) for n in layer.__slots__} for layer in self.layers]
        schemes = fields.pop("schemes").items()  # "grids" is the key that every sealed manifest uses
        fields["grids"] = {name: {n: getattr(scheme, n) for n in scheme.__slots__} for name, scheme in schemes}
        if self.kv_cache is not None:
            fields["kv_cache"] = {n: getattr(self.kv_cache, n) for n in self.kv_cache.__slots__}
        if self.adapters:
            fields["adapters"] = {name: {n: getattr(a, n) for n in a.__slots__} for name, a in self.adapters.items()}
        else:
            del fields["adapters"]  # so that what was sealed before there were any keeps its digest
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
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
        """The spec of a Hugging Face `config.json`; InputError where it is not a decoder-only model."""
        if not isinstance(config, Mapping):
            raise InputError("it is no JSON object", location=location, hint="Copy the file again")
        architecture = (config.get("architectures") or ["?"])[0]
        text = _usual_names(config.get("text_config") or config)
        required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        missing = [key for key in required if not isinstance(text.get(key), int) or text[key] < 1]
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")) or missing:
            lacks = f" and lacks {', '.join(missing)}" if missing else ""
            raise InputError(
                f"architecture {architecture!r} is not a decoder-only language model that edgeopt knows{lacks}",
                location=location,
                hint="Give a model whose architecture ends in ForCausalLM (Llama, Qwen, Gemma, Phi, …)",
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
        return replace(self, layers=layers)


def _usual_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its sizes under the names that most families use."""
    found = dict(config)
    for name, others in _OTHER_NAMES.items():
        given = [config[other] for other in others if config.get(other) is not None]
        if found.get(name) is None and given:
            found[name] = given[0]
    if found.get("intermediate_size") is None and isinstance(config.get("n_embd"), int):
        found["intermediate_size"] = 4 * config["n_embd"]  # where GPT-2 says nothing
    return found
