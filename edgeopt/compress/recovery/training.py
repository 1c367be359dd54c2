"""Training a network a little: what LoRA, distillation and quantization-aware training share."""

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

DIVERGED, NOTICEABLE = 2.0, 0.5
"""A last loss above this multiple of the first one, and by so many nats, is no noise of small batches."""
CHECKS = 10
"""How often in a training the held-out loss is taken and a draft of the state is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How much and how fast.

    Attributes:
        tokens: budget of tokens that are read, the text again and again where it is shorter.
        learning_rate: peak of AdamW's, after a linear warm-up over a tenth, with cosine decay to zero.
        batch_tokens: tokens in one step, as whole windows of `window_tokens`.
        held_out: share of the windows that are not trained on. Training returns to where their loss was
            least, and stops when `patience` checks in a row found nothing better.
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
                f"{self.learning_rate} is outside its range", location="learning_rate", hint="Give more than 0"
            )
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"{self.held_out} is outside its range", location="held_out", hint="Give 0 up to below 1")

    @property
    def batch_windows(self) -> int:
        return max(1, self.batch_tokens // self.window_tokens)

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch_windows * self.window_tokens))

    @property
    def windows(self) -> int:
        """How many windows of text are worth reading."""
        return self.steps * self.batch_windows

    def fit(
        self, network: nn.Module, loss: LossFunction, windows: int, progress: Progress, draft: Path | None = None
    ) -> dict[str, list[float]]:
        """Train the parameters of `network` that require gradients on windows 0 to `windows` - 1.

        With a `draft` folder a training that was killed goes on from its last check. Returns the loss of
        each step and the held-out loss of each check; StepError where training diverged.
        """
        held = held_out(windows, self.held_out, self.seed)
        trained = [n for n in range(windows) if n not in set(held)]
        order = batches(trained, steps=self.steps, size=self.batch_windows, seed=self.seed)
        run = _Run(network, self.learning_rate, self.steps)
        if draft is not None:
            run.restore(draft)
        network.train()
        every = max(1, self.steps // CHECKS)
        while run.step < self.steps and run.waited < self.patience:
            run.advance(loss(network, order[run.step]))
            if run.step % every == 0 or run.step == self.steps:
                run.check(_mean(network, loss, held, self.batch_windows))
                progress(f"training step {run.step} of {self.steps}, loss {run.told}")
                if draft is not None:
                    run.keep(draft)
        network.eval()
        run.return_to_best()
        return {"train": run.losses, "held_out": run.checked}


def held_out(windows: int, share: float, seed: int) -> list[int]:
    """Numbers of the windows that are not trained on: none where that would leave nothing to train on."""
    count = math.ceil(windows * share)
    return sorted(random.Random(seed).sample(range(windows), count)) if count < windows else []  # noqa: S311


def batches(windows: Sequence[int], *, steps: int, size: int, seed: int) -> list[list[int]]:
    """`steps` batches of `size` windows: whole shuffled passes over the text, one after another."""
    shuffle = random.Random(seed)  # noqa: S311 - an order of batches, no secret
    order: list[int] = []
    while len(order) < steps * size:
        order += shuffle.sample(list(windows), len(windows))
    return [order[n * size : (n + 1) * size] for n in range(steps)]


def device() -> Any:
    """Where networks are trained: CUDA where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def diverged(losses: Sequence[float]) -> bool:
    """Whether training ended in no number, or far above where it began."""
    return not losses[-1] < max(DIVERGED * losses[0], losses[0] + NOTICEABLE)


def _mean(network: nn.Module, loss: LossFunction, windows: Sequence[int], size: int) -> float:
    """Mean loss over windows, in evaluation mode; no number where there are none."""
    import torch

    if not windows:
        return math.nan
    network.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), size):
            part = windows[start : start + size]
            total += float(loss(network, part)) * len(part)
    network.train()
    return total / len(windows)


class _Run:
    """The state of one training, which can be kept and restored."""

    def __init__(self, network: nn.Module, learning_rate: float, steps: int) -> None:
        import torch

        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.learning_rate, self.steps = learning_rate, steps
        self.step = self.waited = 0
        self.losses: list[float] = []
        self.checked: list[float] = []
        self.best = [p.detach().clone() for p in self.parameters]

    @property
    def told(self) -> str:
        aside = "" if math.isnan(self.checked[-1]) else f", held out {self.checked[-1]:.3f}"
        return f"{self.losses[-1]:.3f}{aside}"

    def advance(self, loss: Tensor) -> None:
        import torch

        warm = min(1.0, (self.step + 1) / max(1, self.steps // 10))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1
        if not math.isfinite(self.losses[-1]):
            self._refuse()

    def check(self, held_out: float) -> None:
        if diverged(self.losses):
            self._refuse()
        better = math.isnan(held_out) or held_out <= min(self.checked, default=math.inf)
        self.checked.append(held_out)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = [p.detach().clone() for p in self.parameters]

    def return_to_best(self) -> None:
        for parameter, value in zip(self.parameters, self.best, strict=True):
            parameter.data.copy_(value)

    def keep(self, folder: Path) -> None:
        """Write the state as safetensors and JSON; the JSON, written last and at once, makes it valid."""
        import torch

        tensors: dict[str, Tensor] = {}
        for n, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors |= {f"{n}.now": parameter.detach(), f"{n}.best": best}
            state = self.optimizer.state[parameter]
            tensors |= {f"{n}.{key}": torch.as_tensor(value) for key, value in state.items()}
        name = f"state-{self.step}.safetensors"
        safetensors_io.write(tensors, folder / name)
        document = {"step": self.step, "waited": self.waited, "losses": self.losses, "checked": self.checked}
        draft = folder / "state.json.new"
        draft.write_text(json.dumps({**document, "tensors": name}) + "\n")
        draft.replace(folder / "state.json")
        for old in folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def restore(self, folder: Path) -> None:
        if not (folder / "state.json").is_file():
            return
        document = json.loads((folder / "state.json").read_text())
        tensors = safetensors_io.read(folder / document["tensors"])
        self.step, self.waited = document["step"], document["waited"]
        self.losses, self.checked = document["losses"], document["checked"]
        for n, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors.pop(f"{n}.now"))
            self.best[n] = tensors.pop(f"{n}.best").to(parameter.device)
            own = {key.partition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{n}.")}
            self.optimizer.state[parameter] = {
                key: value if value.ndim == 0 else value.to(parameter.device) for key, value in own.items()
            }

    def _refuse(self) -> None:
        raise StepError(
            f"training diverged: the loss went from {self.losses[0]:.3g} to {self.losses[-1]:.3g} "
            f"in {len(self.losses)} steps",
            location="learning_rate",
            hint="Give a smaller learning rate",
        )
