"""Recovery by low-rank adaptation, merged into the weights for the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt import network as networks
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.errors import ConfigError, StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Progress
    from edgeopt.spec import ModelSpec
    from edgeopt.text import Text

DIVERGED = 2.0
"""A last loss above this multiple of the first one is no noise of small batches."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Train low-rank updates of the projections on calibration text (LoRA, arXiv 2106.09685), by peft.

    Attributes:
        rank: 2 to 64, and no larger than the smallest adapted matrix.
        alpha: the update is scaled by alpha / rank.
        batch_tokens: tokens in one step, as whole windows of `window_tokens`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    steps: int = 60
    learning_rate: float = 2e-3
    batch_tokens: int = 1024
    window_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.rank <= 64:
            raise ConfigError(f"{self.rank} is outside its range", place="rank", mend="Give a rank from 2 to 64")
        for name in ("steps", "batch_tokens", "window_tokens"):
            require_positive(getattr(self, name), name)
        for name in ("alpha", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{getattr(self, name)} is outside its range", place=name, mend="Give more than 0")
        unknown = [t for t in self.targets if t not in PROJECTIONS]
        if unknown or not self.targets:
            raise ConfigError(
                f"{unknown or 'no'} projections", place="targets", mend=f"Choose from {', '.join(PROJECTIONS)}"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "lora")
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

    def apply(self, checkpoint: Checkpoint, directory: Path, calibration: Text, progress: Progress) -> ModelSpec:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.seed)
        network = networks.load(checkpoint)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(network.to(device), config)
        a_batch = max(1, self.batch_tokens // self.window_tokens)
        windows = calibration_windows(checkpoint, calibration, count=self.steps * a_batch, length=self.window_tokens)
        losses = train(
            adapted,
            batches(windows, steps=self.steps, size=a_batch, seed=self.seed),
            steps=self.steps,
            learning_rate=self.learning_rate,
            progress=progress,
        )
        if diverged(losses):
            raise StepError(
                f"LoRA diverged: the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in {len(losses)} steps",
                place="learning_rate",
                mend="Give a smaller learning rate",
            )
        artifacts = directory / "artifacts"
        adapted.save_pretrained(artifacts / "adapter", safe_serialization=True)
        (artifacts / "adapter" / "README.md").unlink(missing_ok=True)
        (artifacts / "lora_loss.json").write_text(json.dumps(losses) + "\n")
        networks.save(adapted.merge_and_unload().cpu(), directory, checkpoint, checkpoint.spec)
        return checkpoint.spec


def diverged(losses: Sequence[float]) -> bool:
    """Whether training ended in no number, or far above where it began."""
    return not losses[-1] < DIVERGED * losses[0]


def batches(windows: Sequence[Sequence[int]], *, steps: int, size: int, seed: int) -> list[list[Sequence[int]]]:
    """`steps` batches of `size` windows: whole shuffled passes over the text, one after another."""
    import random

    shuffle = random.Random(seed)  # noqa: S311 - an order of batches, no secret
    order: list[Sequence[int]] = []
    while len(order) < steps * size:
        order += shuffle.sample(list(windows), len(windows))
    return [order[n * size : (n + 1) * size] for n in range(steps)]


def train(
    network: nn.Module, data: Sequence[Sequence[Sequence[int]]], *, steps: int, learning_rate: float, progress: Progress
) -> list[float]:
    """AdamW with linear warm-up over a tenth of the steps and cosine decay; mean loss in nats of each step."""
    import torch

    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    network.train()
    losses: list[float] = []
    for step, batch in enumerate(data):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = batch_loss(network, batch, weights[0].device)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0 or step + 1 == steps:
            progress(f"training step {step + 1} of {steps}, loss {losses[-1]:.3f}")
        if not math.isfinite(losses[-1]):
            break
    network.eval()
    return losses


def batch_loss(network: nn.Module, batch: Sequence[Sequence[int]], device: Any) -> Tensor:
    """Mean next-token negative log-likelihood in nats; shorter windows are padded and not counted."""
    import torch
    from torch.nn.functional import cross_entropy

    length = max(map(len, batch))
    ids = torch.tensor([[*window, *([0] * (length - len(window)))] for window in batch], device=device)
    labels = torch.tensor([[*window, *([-100] * (length - len(window)))] for window in batch], device=device)
    logits = network(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
