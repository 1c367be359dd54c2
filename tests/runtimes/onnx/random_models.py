"""Random checkpoints of all decoder families, and their logits in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.core.artifact import Checkpoint
from runtimes.test_families import FAMILIES, PROMPT, random_checkpoint

ONNX_ONLY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"num_key_value_heads": 4}),
    "opt": ("OPT", {"num_key_value_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "llama": ("Llama", {}),
    "phi": ("Phi", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "small heads": ("Llama", {"head_dim": 8}),
}
ALL_FAMILIES = FAMILIES | ONNX_ONLY_FAMILIES


def import_random_checkpoint(family: str | tuple[str, dict[str, Any]], tokenizer: Path, folder: Path) -> Checkpoint:
    """Import a random checkpoint of a family, given by name or as architecture and config values."""
    architecture, config = ALL_FAMILIES[family] if isinstance(family, str) else family
    (folder / "source").mkdir()
    (folder / "checkpoint").mkdir()
    return import_checkpoint(
        random_checkpoint(architecture, config, tokenizer, folder / "source"), folder / "checkpoint"
    )


def prune_unevenly(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint of three layers, one with fewer channels and one with fewer heads."""
    import torch

    network = modeling.load(checkpoint)
    first, second, _ = modeling.layers(network)
    modeling.keep_channels(first.mlp, torch.arange(40))
    modeling.keep_heads(second.self_attn, torch.arange(32), torch.arange(16), groups=2)
    folder.mkdir()
    spec = modeling.spec_of(network, checkpoint.spec)
    modeling.save(network, folder, checkpoint, spec)
    return Checkpoint.seal(folder, format="checkpoint-1", spec=spec, made_by={})


def torch_logits(checkpoint: Checkpoint, tokens: list[int] = PROMPT) -> np.ndarray:
    """Return the logits of the checkpoint in PyTorch, shape (tokens, vocabulary)."""
    import torch

    with torch.no_grad():
        logits: np.ndarray = modeling.load(checkpoint)(torch.tensor([tokens])).logits[0].numpy()
    return logits
