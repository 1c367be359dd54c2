"""Decoder families as llama.cpp has them: its names, the order of its rows, and what it is told beyond the sizes.

Specification: src/models/ of llama.cpp, one file a family.
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

Tell = Callable[["gguf.GGUFWriter", Mapping[str, Any], "ModelSpec"], None]
"""Writes what a family needs of a `config.json`; BuildError where llama.cpp computes otherwise."""
OTHERWISE = "Use runtime=genai or onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of transformers in llama.cpp.

    Attributes:
        name: llama.cpp's own.
        varied: its name for a family that computes the same with layers of different sizes; empty where it has none.
        paired: the rotary embedding turns neighbouring channels, and not the two halves of a head as in transformers.
        norm_offset: is part of the norms' weights there, and is added by the family's code in transformers.
        windowed: it computes sliding windows.
        tell: what else it is told.
    """

    name: str
    varied: str = ""
    paired: bool = False
    norm_offset: float = 0.0
    windowed: bool = False
    tell: Tell = lambda writer, config, spec: None


def _granite(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _gemma(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Windows in all but the last of every few layers, and scores that are scaled by the head's size alone."""
    if config["query_pre_attn_scalar"] != spec.head_size:
        raise BuildError(
            f"llama.cpp scales scores by heads of {spec.head_size} channels, and this model by "
            f"{config['query_pre_attn_scalar']} (query_pre_attn_scalar)",
            hint=OTHERWISE,
        )
    windows = [kind == "sliding_attention" for kind in config["layer_types"]]
    period = [*windows, False].index(False) + 1
    _require(windows, [number % period < period - 1 for number in range(len(windows))], "sliding windows")
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(period)


def _gemma2(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    _gemma(writer, config, spec)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _gemma3(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    _gemma(writer, config, spec)
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def _phi3(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Where its context was made longer, by how much (LongRoPE, Ding et al. 2024, arXiv:2402.13753)."""
    if config["rope_parameters"]["rope_type"] == "longrope":
        before = config["original_max_position_embeddings"]
        longer = max(1.0, spec.context_length / before)
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(before)))


def _smollm3(writer: gguf.GGUFWriter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    _require(
        [not turned for turned in config["no_rope_layers"]],
        [number % 4 == 3 for number in range(len(spec.layers))],
        "layers without positions",
    )


def _require(given: list[bool], computed: list[bool], what: str) -> None:
    """BuildError where `what` lies in other layers than llama.cpp has it, such as after some were dropped."""
    if given != computed:
        listed = [", ".join(str(n) for n, wanted in enumerate(each) if wanted) or "none" for each in (given, computed)]
        raise BuildError(f"llama.cpp has {what} in layers {listed[1]}, and this model in {listed[0]}", hint=OTHERWISE)


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(name="llama", varied="deci", paired=True),
    "MistralForCausalLM": Family(name="llama", varied="deci", paired=True),
    "Qwen2ForCausalLM": Family(name="qwen2"),
    "Qwen3ForCausalLM": Family(name="qwen3"),
    "Gemma2ForCausalLM": Family(name="gemma2", norm_offset=1.0, windowed=True, tell=_gemma2),
    "Gemma3ForCausalLM": Family(name="gemma3", norm_offset=1.0, windowed=True, tell=_gemma3),
    "Phi3ForCausalLM": Family(name="phi3", tell=_phi3),
    "SmolLM3ForCausalLM": Family(name="smollm3", paired=True, tell=_smollm3),
    "GraniteForCausalLM": Family(name="granite", paired=True, tell=_granite),
}
"""By the architecture in a `config.json`."""
