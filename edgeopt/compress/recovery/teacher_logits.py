"""What a teacher predicts, kept for every trial that learns from it, and the losses that learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeopt.checkpoints import modeling, safetensors_io
from edgeopt.compress.losses import LossFunction, next_token_cross_entropy, next_token_loss, pad_batch
from edgeopt.compress.preconditions import require_positive
from edgeopt.compress.recovery.training import Training, device
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtTraining(Training):
    """Training towards a teacher's predictions on calibration text.

    Attributes:
        remains: see ports.Sparing.
        temperature: softens both predictions.
        truth_weight: share of the loss that is the text's own next token.
        top_k: how many of the teacher's most probable tokens are kept at each position.
    """

    remaining_error: ClassVar[float] = 0.7
    temperature: float = 1.0
    truth_weight: float = 0.0
    top_k: int = 64

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        require_positive(self.top_k, "top_k")
        if self.temperature <= 0:
            raise ConfigError(
                f"{self.temperature} is outside its range", location="temperature", hint="Give more than 0"
            )
        if not 0.0 <= self.truth_weight <= 1.0:
            raise ConfigError(
                f"{self.truth_weight} is outside its range", location="truth_weight", hint="Give a share from 0 to 1"
            )

    def loss(self, teacher: Checkpoint, windows: Sequence[Sequence[int]], context: CompressionContext) -> LossFunction:
        """The distillation loss on `windows`; that of language modelling where the text says everything."""
        if self.truth_weight == 1.0:
            return next_token_loss(windows)
        taught = lessons(teacher, windows, top_k=self.top_k, temperature=self.temperature, context=context)
        return distillation_loss(windows, taught, temperature=self.temperature, truth_weight=self.truth_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogits:
    """The teacher's most probable next tokens at every position of every window.

    Attributes:
        starts: where each window's positions begin.
        tokens: int32, shape (positions, k).
        log_probabilities: fp16 at the temperature they were made with, shape (positions, k).
    """

    starts: tuple[int, ...]
    tokens: Tensor
    log_probabilities: Tensor

    def of(self, window: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens (int64) and log-probabilities (float32) at the positions of one window."""
        rows = slice(self.starts[window], self.starts[window] + length)
        return self.tokens[rows].long(), self.log_probabilities[rows].float()


def lessons(
    teacher: Checkpoint,
    windows: Sequence[Sequence[int]],
    *,
    top_k: int,
    temperature: float,
    context: CompressionContext,
) -> TeacherLogits:
    """The teacher's predictions on `windows`, from the cache where they were made before."""
    import torch

    def produce(directory: Path) -> None:
        network = modeling.load(teacher).to(device())
        tokens, values = [], []
        with torch.inference_mode():
            for number, window in enumerate(windows):
                if number % 16 == 0:
                    context.progress(f"asking the teacher: window {number + 1} of {len(windows)}")
                logits = network(torch.tensor([list(window)], device=device()), use_cache=False).logits[0].float()
                best = (logits / temperature).log_softmax(dim=-1).topk(min(top_k, logits.shape[-1]), dim=-1)
                tokens.append(best.indices.int().cpu())
                values.append(best.values.half().cpu())
        found = {"tokens": torch.cat(tokens), "log_probabilities": torch.cat(values)}
        safetensors_io.write(found, directory / "lessons.safetensors")

    inputs = [teacher.digest, [list(window) for window in windows], top_k, temperature]
    found = safetensors_io.read_folder(context.cache.stage("teacher", inputs, produce))
    starts = tuple(sum(map(len, windows[:n])) for n in range(len(windows)))
    return TeacherLogits(starts=starts, tokens=found["tokens"], log_probabilities=found["log_probabilities"])


def distillation_loss(
    windows: Sequence[Sequence[int]], taught: TeacherLogits, *, temperature: float, truth_weight: float
) -> LossFunction:
    """(1 - w) T² KL(teacher ‖ student) at temperature T + w times the loss of language modelling.

    Hinton et al., arXiv 1503.02531; the square keeps gradients alike over temperatures.
    """
    import torch

    def loss(network: nn.Module, batch: Sequence[int]) -> Tensor:
        ids, labels = pad_batch([windows[n] for n in batch], next(network.parameters()).device)
        logits = network(input_ids=ids, use_cache=False).logits
        divergences = []
        for row, n in enumerate(batch):
            tokens, expected = taught.of(n, len(windows[n]))
            found = (logits[row, : len(tokens)].float() / temperature).log_softmax(dim=-1)
            divergences.append(divergence(expected.to(found.device), found.gather(1, tokens.to(found.device))))
        learned = temperature**2 * torch.cat(divergences).mean()
        return (
            learned
            if truth_weight == 0
            else (1 - truth_weight) * learned + truth_weight * next_token_cross_entropy(logits, labels)
        )

    return loss


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL over the teacher's best tokens and one more for all the others, in nats, shape (positions,).

    Args:
        expected, found: log-probabilities of the same tokens by teacher and student, shape (positions, k).
    """
    rest, own = remainder(expected), remainder(found)
    listed = (expected.exp() * (expected - found)).sum(dim=-1)
    return listed + rest * (rest.log() - own.log())


def remainder(log_probabilities: Tensor) -> Tensor:
    """Probability of all tokens that are not listed, kept off zero."""
    return (1.0 - log_probabilities.exp().sum(dim=-1)).clamp(min=1e-6)
