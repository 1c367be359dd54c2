"""Build checkpoints with random adapters, and checkpoints with these adapters merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRankUpdate
from edgeopt.compress.recovery.lora import PROJECTION_NAMES, target_modules
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.model_spec import Adapter


def add_adapter(
    checkpoint: Checkpoint, directory: Path, adapter: str, targets: Sequence[str] = PROJECTION_NAMES
) -> Checkpoint:
    """Return the checkpoint with one more adapter of large random updates. Its name contains its rank: `r4`."""
    import torch

    directory.mkdir()
    modeling.link_checkpoint(checkpoint, directory)
    network, rank = modeling.load(checkpoint), int(adapter[1:])
    generator = torch.Generator().manual_seed(rank)
    updates = {}
    for name in target_modules(network, targets):
        rows, columns = network.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        updates[name] = LowRankUpdate(down=0.3 * down / columns**0.5, up=up / rank**0.5)
    adapters.write(updates, directory, adapter)
    all_adapters = {**checkpoint.spec.adapters, adapter: Adapter(rank=rank, targets=tuple(targets))}
    spec = replace(checkpoint.spec, adapters=all_adapters)
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


def merge_adapter(checkpoint: Checkpoint, directory: Path, adapter: str) -> Checkpoint:
    """Return an fp32 checkpoint with one adapter of `checkpoint` merged into the weights, without separate adapters."""
    directory.mkdir()
    network, spec = modeling.load(checkpoint), replace(checkpoint.spec.in_fp32, adapters={})
    for name, update in adapters.read(checkpoint.directory, adapter).items():
        network.get_submodule(name).weight.data += update.up @ update.down
    modeling.save(network, directory, checkpoint, spec)
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})
