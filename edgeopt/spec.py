"""What a decoder-only model is, without its weights: sizes of every layer and how weights are stored.

Steps predict their effect on a spec by arithmetic alone, so an impossible recipe is refused and a
size estimated before any tensor is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Sizes of one decoder layer: MLP channels, query heads and key-value heads."""

    intermediate_size: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weight-only block quantization of an engine: bits, block size, rounding method.

    `lm_head_bits` and `embedding_bits` are 32 where the table stays unquantized.
    """

    bits: int
    block_size: int
    symmetric: bool
    method: str
    lm_head_bits: int
    embedding_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a decoder-only transformer.

    `weight_dtype` is the type an unquantized engine stores and computes in: fp32 or fp16.
    """

    architecture: str
    vocabulary_size: int
    hidden_size: int
    head_size: int
    context_length: int
    tied_embeddings: bool
    layers: tuple[LayerSpec, ...]
    weight_dtype: str = "fp32"
    quantization: Quantization | None = None

    @property
    def parameters(self) -> int:
        """Weights of the matrices and norms, each table counted once where it is tied."""
        tables = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return tables + sum(self.layer_parameters(layer) for layer in self.layers) + self.hidden_size

    @property
    def shares_tables(self) -> bool:
        """Whether an engine stores embedding and lm_head once: they are tied and rounded alike."""
        q = self.quantization
        return self.tied_embeddings and (q is None or q.embedding_bits == q.lm_head_bits)

    def layer_parameters(self, layer: LayerSpec) -> int:
        attention = 2 * self.hidden_size * self.head_size * (layer.heads + layer.kv_heads)
        mlp = 3 * self.hidden_size * layer.intermediate_size
        return attention + mlp + 2 * self.hidden_size

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["layers"] = [{n: getattr(layer, n) for n in layer.__slots__} for layer in self.layers]
        if self.quantization is not None:
            fields["quantization"] = {n: getattr(self.quantization, n) for n in self.quantization.__slots__}
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        fields = dict(data)
        fields["layers"] = tuple(LayerSpec(**layer) for layer in fields["layers"])
        if fields.get("quantization") is not None:
            fields["quantization"] = Quantization(**fields["quantization"])
        return cls(**fields)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], place: str = "config.json") -> ModelSpec:
        """The spec of a Hugging Face `config.json`; InputError where it is not a decoder-only model."""
        if not isinstance(config, Mapping):
            raise InputError("it is no JSON object", place=place, mend="Copy the file again")
        architecture = (config.get("architectures") or ["?"])[0]
        text = config.get("text_config") or config
        required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        missing = [key for key in required if not isinstance(text.get(key), int) or text[key] < 1]
        if not architecture.endswith("ForCausalLM") or missing:
            lacks = f" and lacks {', '.join(missing)}" if missing else ""
            raise InputError(
                f"architecture {architecture!r} is not a decoder-only language model that edgeopt knows{lacks}",
                place=place,
                mend="Give a model whose architecture ends in ForCausalLM (Llama, Qwen, Gemma, Phi, …)",
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
