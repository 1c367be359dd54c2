"""The lever to pull next when an engine does not fit."""

from __future__ import annotations

from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec


def suggest_next_step(spec: ModelSpec) -> str:
    """What to try next when an engine does not fit: quantize, then prune, then distil."""
    layers = [grid for name, grid in spec.schemes.items() if name not in (LM_HEAD, EMBEDDING)]
    if not layers:
        return "quantize: recipe=int8 or recipe=int4 divides the weights by 4 or 7"
    if max(grid.bits for grid in layers) > 4:
        return "quantize further: recipe=int4"
    if EMBEDDING not in spec.schemes and not (spec.tied_embeddings and LM_HEAD in spec.schemes):
        return "quantize the tables: step.quantize.embedding=int8 step.quantize.lm_head=int8"
    if min(grid.block_size for grid in layers) < 128:
        return "prune: recipe=prune_lora_int4, or larger blocks: step.quantize.block_size=128"
    return "prune (recipe=prune_lora_int4 or depth_lora_int4), then take a smaller model and distil into it"
