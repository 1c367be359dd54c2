"""Suggest the next compression technique when an engine exceeds its limits."""

from __future__ import annotations

from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec


def suggest_next_step(spec: ModelSpec) -> str:
    """Return the next technique to try: first quantize, then prune, then distill."""
    schemes = [scheme for name, scheme in spec.schemes.items() if name not in (LM_HEAD, EMBEDDING)]
    if not schemes:
        return "quantize: recipe=int8 makes the weights 4 times smaller, recipe=int4 7 times"
    if max(scheme.bits for scheme in schemes) > 4:
        return "quantize further: recipe=int4"
    if EMBEDDING not in spec.schemes and not (spec.tied_embeddings and LM_HEAD in spec.schemes):
        return "quantize the embedding and lm_head: step.quantize.embedding=int8 step.quantize.lm_head=int8"
    if min(scheme.block_size for scheme in schemes) < 128:
        return "prune (recipe=prune_lora_int4), or use larger blocks (step.quantize.block_size=128)"
    return "prune (recipe=prune_lora_int4 or depth_lora_int4), then distill into a smaller model"
