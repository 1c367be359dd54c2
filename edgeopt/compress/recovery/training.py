"""Train a network for a fixed token budget, with held-out early stopping and resumable state.

LoRA, distillation and quantization-aware training share this loop.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import safetensors_io
from edgeopt.compress.losses import LossFunction
from edgeopt.compress.preconditions import require_positive
from edgeopt.errors import ConfigError, StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.protocols import Progress

DIVERGENCE_FACTOR, DIVERGENCE_NATS = 2.0, 0.5
"""Training has diverged if its last loss exceeds the first one by this factor and by this many nats.

Smaller increases are noise of small batches.
"""
CHECK_COUNT = 10
"""Number of times per training that the held-out loss is measured and the state is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Token budget, learning rate and early stopping of a training step.

    Attributes:
        tokens: budget of training tokens; a shorter text is repeated.
        learning_rate: peak learning rate of AdamW. It warms up linearly over the first tenth of the steps and decays
            to zero along a cosine.
        batch_tokens: tokens per step, rounded down to whole windows.
        window_tokens: tokens per window of calibration text.
        held_out: share of the windows that is held out from training. The weights with the least held-out loss are
            kept.
        patience: number of consecutive checks without a lower held-out loss that stops training.
        seed: seed of the batch order, the held-out windows and initial values.
    """

    tokens: int = 61_440
    learning_rate: float = 2e-3
    batch_tokens: int = 1024
    window_tokens: int = 256
    held_out: float = 0.05
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "window_tokens", "patience"):
            require_positive(getattr(self, name), name)
        if self.learning_rate <= 0:
            raise ConfigError(
                f"`learning_rate` must be greater than 0, got {self.learning_rate}",
                location="learning_rate",
                hint="Use a value such as 0.0005",
            )
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(
                f"`held_out` must be at least 0 and less than 1, got {self.held_out}",
                location="held_out",
                hint="Use a share such as 0.05, or 0 to train on all windows",
            )

    @property
    def batch_windows(self) -> int:
        """Return the number of windows per step."""
        return max(1, self.batch_tokens // self.window_tokens)

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps that the token budget allows."""
        return max(1, self.tokens // (self.batch_windows * self.window_tokens))

    @property
    def windows(self) -> int:
        """Return the number of windows that a training without repetition reads."""
        return self.steps * self.batch_windows

    def fit(
        self, network: nn.Module, loss: LossFunction, window_count: int, progress: Progress, draft: Path | None = None
    ) -> dict[str, list[float]]:
        """Train the parameters of `network` that require gradients; return the training and held-out losses.

        Args:
            network: trained in place; it ends in evaluation mode with the best weights.
            loss: mean loss on a batch of window indices.
            window_count: number of windows; `loss` accepts the indices from 0 to `window_count` - 1.
            progress: called at every check.
            draft: folder for the state; a killed training resumes from its last check.

        Returns:
            `train`, the loss of each step, and `held_out`, the held-out loss of each check, in nats.

        Raises:
            StepError: if training diverges.
        """
        held_out = select_held_out(window_count, self.held_out, self.seed)
        training_windows = [n for n in range(window_count) if n not in set(held_out)]
        batches = sample_batches(training_windows, steps=self.steps, batch_size=self.batch_windows, seed=self.seed)
        state = _TrainingState(network, self.learning_rate, self.steps)
        if draft is not None:
            state.restore(draft)
        network.train()
        check_interval = max(1, self.steps // CHECK_COUNT)
        while state.step < self.steps and state.checks_without_improvement < self.patience:
            state.advance(loss(network, batches[state.step]))
            if state.step % check_interval == 0 or state.step == self.steps:
                state.check(_mean_loss(network, loss, held_out, self.batch_windows))
                progress(f"training step {state.step} of {self.steps}, {state.loss_summary}")
                if draft is not None:
                    state.save(draft)
        network.eval()
        state.restore_best()
        return {"train": state.losses, "held_out": state.held_out_losses}


def select_held_out(window_count: int, share: float, seed: int) -> list[int]:
    """Return the sorted indices of the held-out windows; empty if no window would remain for training."""
    count = math.ceil(window_count * share)
    return sorted(random.Random(seed).sample(range(window_count), count)) if count < window_count else []  # noqa: S311


def sample_batches(windows: Sequence[int], *, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return `steps` batches of `batch_size` windows from consecutive shuffled passes over all windows."""
    generator = random.Random(seed)  # noqa: S311 - orders batches, needs no cryptographic randomness
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += generator.sample(list(windows), len(windows))
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def training_device() -> Any:
    """Return the torch device for training: CUDA if available, otherwise the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_diverged(losses: Sequence[float]) -> bool:
    """Return True if the last loss is not a number or far above the first one."""
    return not losses[-1] < max(DIVERGENCE_FACTOR * losses[0], losses[0] + DIVERGENCE_NATS)


def _mean_loss(network: nn.Module, loss: LossFunction, windows: Sequence[int], batch_size: int) -> float:
    """Return the mean loss over windows in evaluation mode, NaN if there are none."""
    import torch

    if not windows:
        return math.nan
    network.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            total += float(loss(network, batch)) * len(batch)
    network.train()
    return total / len(windows)


class _TrainingState:
    """Optimizer, best weights and losses of one training, which can be saved and restored."""

    def __init__(self, network: nn.Module, learning_rate: float, steps: int) -> None:
        import torch

        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.learning_rate, self.steps = learning_rate, steps
        self.step = self.checks_without_improvement = 0
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self.best = [p.detach().clone() for p in self.parameters]

    @property
    def loss_summary(self) -> str:
        held_out = self.held_out_losses[-1]
        suffix = "" if math.isnan(held_out) else f", held-out loss {held_out:.3f}"
        return f"loss {self.losses[-1]:.3f}{suffix}"

    def advance(self, loss: Tensor) -> None:
        """Take one optimizer step. Raises StepError if the loss is not finite."""
        import torch

        warmup = min(1.0, (self.step + 1) / max(1, self.steps // 10))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1
        if not math.isfinite(self.losses[-1]):
            self._raise_diverged()

    def check(self, held_out_loss: float) -> None:
        """Record a held-out loss and keep the weights if it is the lowest. Raises StepError on divergence."""
        if has_diverged(self.losses):
            self._raise_diverged()
        improved = math.isnan(held_out_loss) or held_out_loss <= min(self.held_out_losses, default=math.inf)
        self.held_out_losses.append(held_out_loss)
        self.checks_without_improvement = 0 if improved else self.checks_without_improvement + 1
        if improved:
            self.best = [p.detach().clone() for p in self.parameters]

    def restore_best(self) -> None:
        """Copy the weights with the lowest held-out loss into the network."""
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.data.copy_(best)

    def save(self, folder: Path) -> None:
        """Write the state as safetensors and JSON.

        The JSON names the tensor file and is replaced atomically after it, so that a kill leaves a valid state.
        """
        import torch

        tensors: dict[str, Tensor] = {}
        for n, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors |= {f"{n}.now": parameter.detach(), f"{n}.best": best}
            optimizer_state = self.optimizer.state[parameter]
            tensors |= {f"{n}.{key}": torch.as_tensor(value) for key, value in optimizer_state.items()}
        tensor_file = f"state-{self.step}.safetensors"
        safetensors_io.write(tensors, folder / tensor_file)
        document = {
            "step": self.step,
            "waited": self.checks_without_improvement,
            "losses": self.losses,
            "checked": self.held_out_losses,
            "tensors": tensor_file,
        }
        temporary = folder / "state.json.new"
        temporary.write_text(json.dumps(document) + "\n")
        temporary.replace(folder / "state.json")
        for outdated in folder.glob("state-*.safetensors"):
            if outdated.name != tensor_file:
                outdated.unlink()

    def restore(self, folder: Path) -> None:
        """Load the state that `save` wrote into `folder`, if there is one."""
        if not (folder / "state.json").is_file():
            return
        document = json.loads((folder / "state.json").read_text())
        tensors = safetensors_io.read(folder / document["tensors"])
        self.step, self.checks_without_improvement = document["step"], document["waited"]
        self.losses, self.held_out_losses = document["losses"], document["checked"]
        for n, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors.pop(f"{n}.now"))
            self.best[n] = tensors.pop(f"{n}.best").to(parameter.device)
            optimizer_state = {key.partition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{n}.")}
            self.optimizer.state[parameter] = {
                key: value if value.ndim == 0 else value.to(parameter.device) for key, value in optimizer_state.items()
            }

    def _raise_diverged(self) -> None:
        raise StepError(
            f"Training diverged: the loss went from {self.losses[0]:.3g} to {self.losses[-1]:.3g} "
            f"at step {len(self.losses)}",
            location="learning_rate",
            hint="Use a smaller learning rate",
        )
