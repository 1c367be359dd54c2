"""Structured pruning of whole decoder layers by block influence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt import network as networks
from edgeopt.compress.activations import block_influence, calibration_windows
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Workshop
    from edgeopt.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneDepth:
    """Remove the `layers` decoder layers that change the residual stream least (ShortGPT, arXiv 2403.03853).

    They are removed one at a time, and influence is measured again after each.
    """

    layers: int = 1
    windows: int = 16
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "windows", "window_tokens"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_depth")
        if self.layers >= len(spec.layers):
            raise ConfigError(
                f"{self.layers} of {len(spec.layers)} layers cannot be removed",
                place="layers",
                mend=f"Give at most {len(spec.layers) - 1}",
            )
        return spec.with_layers(spec.layers[: -self.layers])

    def apply(self, checkpoint: Checkpoint, directory: Path, shop: Workshop) -> ModelSpec:
        from torch import nn

        network = networks.load(checkpoint)
        windows = calibration_windows(checkpoint, shop.calibration, count=self.windows, length=self.window_tokens)
        kept = list(range(len(checkpoint.spec.layers)))
        for removed in range(self.layers):
            shop.progress(f"weighing {len(kept)} layers ({removed} of {self.layers} removed)")
            influence = block_influence(network, windows)
            weakest = influence.index(min(influence))
            del kept[weakest]
            remaining = [layer for n, layer in enumerate(networks.layers(network)) if n != weakest]
            network.get_decoder().layers = nn.ModuleList(remaining)
            network.config.num_hidden_layers = len(remaining)
            for key in networks.PER_LAYER:
                if entries := getattr(network.config, key, None):
                    setattr(network.config, key, [entry for n, entry in enumerate(entries) if n != weakest])
        spec = checkpoint.spec.with_layers(tuple(checkpoint.spec.layers[n] for n in kept))
        networks.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_depth.json").write_text(json.dumps({"kept_layers": kept}) + "\n")
        return spec
