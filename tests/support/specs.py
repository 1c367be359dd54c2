"""Build specs of small models for tests that need no weights."""

from __future__ import annotations

from edgeopt.core.model_spec import LayerSpec, ModelSpec


def llama(
    *,
    vocabulary: int = 300,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    layers: int = 2,
    context: int = 256,
    tied: bool = True,
) -> ModelSpec:
    """Return the spec of a Llama with equal layers. The defaults describe the fixture `tiny_model`."""
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        head_size=head_size,
        context_length=context,
        tied_embeddings=tied,
        layers=(LayerSpec(intermediate_size=intermediate, heads=heads, kv_heads=kv_heads),) * layers,
    )
