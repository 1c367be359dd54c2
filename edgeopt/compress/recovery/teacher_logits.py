"""Compute and cache the predictions of a teacher, and define the distillation losses that use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeopt.checkpoints import modeling, safetensors_io
from edgeopt.compress.losses import LossFunction, next_token_cross_entropy, next_token_loss, pad_batch
from edgeopt.compress.preconditions import require_positive
from edgeopt.compress.recovery.training import Training, training_device
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationTraining(Training):
    """Training that makes the model match a teacher's predictions on calibration text.

    Attributes:
        remaining_error: see `core.protocols.ErrorReducing`.
        temperature: divides the logits of teacher and student before the softmax.
        truth_weight: weight of the next-token loss on the text itself, from 0 (teacher only) to 1 (text only).
        top_k: number of the teacher's most probable tokens that are stored per position.
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
                f"`temperature` must be greater than 0, got {self.temperature}",
                location="temperature",
                hint="Use a value such as 1 or 2",
            )
        if not 0.0 <= self.truth_weight <= 1.0:
            raise ConfigError(
                f"`truth_weight` must be between 0 and 1, got {self.truth_weight}",
                location="truth_weight",
                hint="Use 0 to learn from the teacher only, or 1 to learn from the text only",
            )

    def loss(self, teacher: Checkpoint, windows: Sequence[Sequence[int]], context: CompressionContext) -> LossFunction:
        """Return the distillation loss on `windows`, or the language-modeling loss if `truth_weight` is 1."""
        if self.truth_weight == 1.0:
            return next_token_loss(windows)
        teacher_logits = compute_teacher_logits(
            teacher, windows, top_k=self.top_k, temperature=self.temperature, context=context
        )
        return distillation_loss(windows, teacher_logits, temperature=self.temperature, truth_weight=self.truth_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogits:
    """The teacher's most probable next tokens at every position of every window.

    Attributes:
        window_starts: index of the first position of each window.
        tokens: int32, shape (positions, k).
        log_probabilities: log-softmax of the teacher's logits / temperature, fp16, shape (positions, k).
    """

    window_starts: tuple[int, ...]
    tokens: Tensor
    log_probabilities: Tensor

    def window(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """Return tokens (int64) and log-probabilities (float32) of one window, shape (length, k) each."""
        rows = slice(self.window_starts[index], self.window_starts[index] + length)
        return self.tokens[rows].long(), self.log_probabilities[rows].float()


def compute_teacher_logits(
    teacher: Checkpoint,
    windows: Sequence[Sequence[int]],
    *,
    top_k: int,
    temperature: float,
    context: CompressionContext,
) -> TeacherLogits:
    """Return the teacher's predictions on `windows`, computed once and then read from the cache."""
    import torch

    def produce(directory: Path) -> None:
        network = modeling.load(teacher).to(training_device())
        tokens, log_probabilities = [], []
        with torch.inference_mode():
            for index, window in enumerate(windows):
                if index % 16 == 0:
                    context.progress(f"computing teacher logits: window {index + 1} of {len(windows)}")
                ids = torch.tensor([list(window)], device=training_device())
                logits = network(ids, use_cache=False).logits[0].float()
                best = (logits / temperature).log_softmax(dim=-1).topk(min(top_k, logits.shape[-1]), dim=-1)
                tokens.append(best.indices.int().cpu())
                log_probabilities.append(best.values.half().cpu())
        computed = {"tokens": torch.cat(tokens), "log_probabilities": torch.cat(log_probabilities)}
        safetensors_io.write(computed, directory / "teacher_logits.safetensors")

    inputs = [teacher.digest, [list(window) for window in windows], top_k, temperature]
    stored = safetensors_io.read_folder(context.cache.get_or_create("teacher", inputs, produce))
    *window_starts, _ = accumulate(map(len, windows), initial=0)
    return TeacherLogits(
        window_starts=tuple(window_starts), tokens=stored["tokens"], log_probabilities=stored["log_probabilities"]
    )


def distillation_loss(
    windows: Sequence[Sequence[int]], teacher_logits: TeacherLogits, *, temperature: float, truth_weight: float
) -> LossFunction:
    """Return (1 - w) T² KL(teacher ‖ student) at temperature T plus w times the language-modeling loss.

    See Hinton et al., arXiv 1503.02531. The factor T² keeps the size of gradients independent of the temperature.
    """
    import torch

    def loss(network: nn.Module, batch: Sequence[int]) -> Tensor:
        ids, labels = pad_batch([windows[n] for n in batch], next(network.parameters()).device)
        logits = network(input_ids=ids, use_cache=False).logits
        divergences = []
        for row, n in enumerate(batch):
            tokens, teacher = teacher_logits.window(n, len(windows[n]))
            student = (logits[row, : len(tokens)].float() / temperature).log_softmax(dim=-1)
            listed = student.gather(1, tokens.to(student.device))
            divergences.append(top_k_divergence(teacher.to(student.device), listed))
        distilled = temperature**2 * torch.cat(divergences).mean()
        if truth_weight == 0:
            return distilled
        return (1 - truth_weight) * distilled + truth_weight * next_token_cross_entropy(logits, labels)

    return loss


def top_k_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) in nats, shape (positions,), where all unlisted tokens count as one token.

    Args:
        teacher, student: log-probabilities of the teacher's k most probable tokens, shape (positions, k).
    """
    teacher_rest, student_rest = unlisted_probability(teacher), unlisted_probability(student)
    listed = (teacher.exp() * (teacher - student)).sum(dim=-1)
    return listed + teacher_rest * (teacher_rest.log() - student_rest.log())


def unlisted_probability(log_probabilities: Tensor) -> Tensor:
    """Return the total probability of all unlisted tokens, at least 1e-6 so that its logarithm is finite."""
    return (1.0 - log_probabilities.exp().sum(dim=-1)).clamp(min=1e-6)
