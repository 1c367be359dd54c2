"""Describe how llama.cpp implements each decoder family: names, row order and the metadata beyond the sizes.

Specification: `src/models/` of llama.cpp, one file per family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.errors import BuildError

if TYPE_CHECKING:
    import gguf

    from edgeopt.core.model_spec import ModelSpec

MetadataWriter = Callable[["gguf.GGUFWriter", Mapping[str, Any], "ModelSpec"], None]
"""Writes the metadata of one family from its `config.json`. Raises BuildError if llama.cpp computes it differently."""
OTHER_RUNTIME_HINT = "Use runtime=genai or runtime=onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A decoder family as llama.cpp implements it.

    Attributes:
        name: llama.cpp's name of the architecture.
        varied_name: name of an equivalent architecture that supports layers of different sizes; empty if none exists.
        interleaved_rope: rotary embeddings rotate adjacent channels, where transformers rotates the halves of a head.
        norm_offset: constant that llama.cpp expects in the norm weights and transformers adds at run time.
        sliding_window: llama.cpp supports sliding-window attention in this family.
        write_metadata: writes the metadata that only this family has.
    """

    name: str
    varied_name: str = ""
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    sliding_window: bool = False
    write_metadata: MetadataWriter = lambda writer, config, spec: None


def _write_granite(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _write_gemma(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Write the sliding window and its period: every period ends with one layer of full attention.

    llama.cpp scales attention scores by the head size only, so other scales are rejected.
    """
    if config["query_pre_attn_scalar"] != spec.head_size:
        raise BuildError(
            f"`query_pre_attn_scalar` must equal the head size {spec.head_size} for llama.cpp, "
            f"got {config['query_pre_attn_scalar']}",
            hint=OTHER_RUNTIME_HINT,
        )
    windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
    period = [*windowed, False].index(False) + 1
    _require_layers(windowed, [index % period < period - 1 for index in range(len(windowed))], "sliding windows")
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(period)


def _write_gemma2(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    _write_gemma(writer, config, spec)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _write_gemma3(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    _write_gemma(writer, config, spec)
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def _write_phi3(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Write the context extension of LongRoPE, if the model has one (Ding et al. 2024, arXiv:2402.13753)."""
    if config["rope_parameters"]["rope_type"] == "longrope":
        original_length = config["original_max_position_embeddings"]
        factor = max(1.0, spec.context_length / original_length)
        writer.add_rope_scaling_orig_ctx_len(original_length)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original_length)))


def _check_smollm3(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Check that exactly every fourth layer has no rotary embedding, as llama.cpp hard-codes."""
    _require_layers(
        [not uses_rope for uses_rope in config["no_rope_layers"]],
        [index % 4 == 3 for index in range(len(spec.layers))],
        "layers without rotary embedding",
    )


def _require_layers(actual: list[bool], expected: list[bool], feature: str) -> None:
    """Raise BuildError if a feature is in other layers than llama.cpp assumes, such as after depth pruning."""
    if actual != expected:
        actual_layers, expected_layers = (
            [index for index, has_feature in enumerate(flags) if has_feature] for flags in (actual, expected)
        )
        raise BuildError(
            f"{feature} must be in layers {expected_layers} for llama.cpp, got {actual_layers}",
            hint=OTHER_RUNTIME_HINT,
        )


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(name="llama", varied_name="deci", interleaved_rope=True),
    "MistralForCausalLM": Family(name="llama", varied_name="deci", interleaved_rope=True),
    "Qwen2ForCausalLM": Family(name="qwen2"),
    "Qwen3ForCausalLM": Family(name="qwen3"),
    "Gemma2ForCausalLM": Family(name="gemma2", norm_offset=1.0, sliding_window=True, write_metadata=_write_gemma2),
    "Gemma3ForCausalLM": Family(name="gemma3", norm_offset=1.0, sliding_window=True, write_metadata=_write_gemma3),
    "Phi3ForCausalLM": Family(name="phi3", write_metadata=_write_phi3),
    "SmolLM3ForCausalLM": Family(name="smollm3", interleaved_rope=True, write_metadata=_check_smollm3),
    "GraniteForCausalLM": Family(name="granite", interleaved_rope=True, write_metadata=_write_granite),
}
"""Supported families by the architecture in `config.json`."""
