"""Recovery by low-rank adaptation, merged into the weights for the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt import network as networks
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_float
from edgeopt.compress.training import Training, device, next_token_loss
from edgeopt.errors import ConfigError
from edgeopt.part import describe

if TYPE_CHECKING:
    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Workshop
    from edgeopt.spec import ModelSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(Training):
    """Train low-rank updates of the projections on calibration text (LoRA, arXiv 2106.09685), by peft.

    Attributes:
        rank: 2 to 64, and no larger than the smallest adapted matrix.
        alpha: the update is scaled by alpha / rank, or by alpha / √rank with `rank_stabilized` (rsLoRA,
            arXiv 2312.03732), which keeps high ranks from learning slowly.
        decomposed: train magnitude and direction of each row apart (DoRA, arXiv 2402.09353).
    """

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    decomposed: bool = False
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        if not 2 <= self.rank <= 64:
            raise ConfigError(f"{self.rank} is outside its range", place="rank", mend="Give a rank from 2 to 64")
        if self.alpha <= 0:
            raise ConfigError(f"{self.alpha} is outside its range", place="alpha", mend="Give more than 0")
        unknown = [t for t in self.targets if t not in PROJECTIONS]
        if unknown or not self.targets:
            raise ConfigError(
                f"{unknown or 'no'} projections", place="targets", mend=f"Choose from {', '.join(PROJECTIONS)}"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "lora")
        require_dense(spec, "lora")
        smallest = min(
            min(spec.hidden_size, layer.intermediate_size, layer.kv_heads * spec.head_size) for layer in spec.layers
        )
        if self.rank > smallest:
            raise ConfigError(
                f"rank {self.rank} exceeds the smallest matrix side {smallest}",
                place="rank",
                mend=f"Give at most {smallest}",
            )
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, shop: Workshop) -> ModelSpec:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.seed)
        network = networks.load(checkpoint)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            lora_dropout=0.0,
            use_rslora=self.rank_stabilized,
            use_dora=self.decomposed,
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(network.to(device()), config)
        windows = calibration_windows(checkpoint, shop.calibration, count=self.windows, length=self.window_tokens)
        with shop.cache.draft(["lora", checkpoint.digest, shop.calibration.digest, describe(self)]) as draft:
            losses = self.fit(adapted, next_token_loss(windows), len(windows), shop.progress, draft)
        artifacts = directory / "artifacts"
        adapted.save_pretrained(artifacts / "adapter", safe_serialization=True)
        (artifacts / "adapter" / "README.md").unlink(missing_ok=True)
        (artifacts / "lora_loss.json").write_text(json.dumps(losses) + "\n")
        networks.save(adapted.merge_and_unload().cpu(), directory, checkpoint, checkpoint.spec)
        return checkpoint.spec
