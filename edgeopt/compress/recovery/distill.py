"""Distill knowledge: train a model to reproduce the predictions of its teacher."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import importing, modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.losses import LossFunction, pad_batch
from edgeopt.compress.preconditions import require_dense, require_float
from edgeopt.compress.recovery.teacher_logits import DistillationTraining
from edgeopt.compress.recovery.training import training_device
from edgeopt.core.config_objects import to_config
from edgeopt.core.protocols import ModelSource
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(DistillationTraining):
    """Train all weights towards the teacher's predictions on calibration text (arXiv 1503.02531).

    Attributes:
        teacher: a model with the same vocabulary; null uses the recipe's uncompressed model.
        hidden_weight: weight of the squared error of the hidden states after each layer, relative to the teacher's
            variance (TinyBERT, arXiv 1909.10351). Student layers are mapped evenly to teacher layers. A value
            above 0 runs the teacher in every training step.
    """

    learning_rate: float = 5e-4
    teacher: ModelSource | None = None
    truth_weight: float = 0.3
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        DistillationTraining.__post_init__(self)
        if self.hidden_weight < 0:
            raise ConfigError(
                f"`hidden_weight` must be at least 0, got {self.hidden_weight}",
                location="hidden_weight",
                hint="Use 0 to train on predictions only",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "distill")
        require_dense(spec, "distill")
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        torch.manual_seed(self.seed)
        teacher = self._load_teacher(checkpoint, context)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        loss = self.loss(teacher, windows, context)
        network = modeling.load(checkpoint).requires_grad_(True).to(training_device())
        if self.hidden_weight:
            self._require_equal_hidden_size(checkpoint, teacher)
            teacher_network = modeling.load(teacher).to(training_device())
            loss = add_hidden_state_loss(loss, teacher_network, windows, self.hidden_weight)
        inputs = ["distill", checkpoint.digest, teacher.digest, context.calibration.digest, to_config(self)]
        with context.cache.resumable_folder(inputs) as draft:
            losses = self.fit(network, loss, len(windows), context.progress, draft)
        modeling.save(network.cpu(), directory, checkpoint, checkpoint.spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "distill_loss.json").write_text(json.dumps(losses) + "\n")
        return checkpoint.spec

    def _require_equal_hidden_size(self, student: Checkpoint, teacher: Checkpoint) -> None:
        student_size, teacher_size = student.spec.hidden_size, teacher.spec.hidden_size
        if student_size != teacher_size:
            raise ConfigError(
                f"`hidden_weight` must be 0 when the hidden sizes differ, got {teacher_size} channels in the teacher "
                f"and {student_size} in the model",
                location="hidden_weight",
                hint="Use 0 to train on predictions only",
            )

    def _load_teacher(self, checkpoint: Checkpoint, context: CompressionContext) -> Checkpoint:
        """Return the teacher's checkpoint. Raises ConfigError if its vocabulary size differs from the student's."""
        if self.teacher is None:
            return context.original
        teacher = importing.import_checkpoint(self.teacher.locate(), Path(tempfile.mkdtemp(prefix="edgeopt-teacher-")))
        student_size, teacher_size = checkpoint.spec.vocabulary_size, teacher.spec.vocabulary_size
        if student_size != teacher_size:
            raise ConfigError(
                f"`teacher` must have the vocabulary size of the model ({student_size} tokens), "
                f"got {teacher_size} tokens",
                location="teacher",
                hint="Use a teacher with the same tokenizer",
            )
        return teacher


def add_hidden_state_loss(
    loss: LossFunction, teacher: nn.Module, windows: Sequence[Sequence[int]], weight: float
) -> LossFunction:
    """Return `loss` plus `weight` times the mean error of the hidden states of the student's layers.

    The error of a layer is its squared difference to the mapped layer of `teacher`, divided by the sum of that
    layer's squares. Padding is excluded.
    """
    import torch

    def combined_loss(network: nn.Module, batch: Sequence[int]) -> Tensor:
        ids, labels = pad_batch([windows[n] for n in batch], next(network.parameters()).device)
        not_padding = (labels != -100)[..., None]
        with torch.no_grad():
            teacher_states = _hidden_states(teacher, ids)
        student_states = _hidden_states(network, ids)
        error = torch.zeros((), device=ids.device)
        for layer, state in enumerate(student_states):
            target = teacher_states[teacher_layer(layer, len(student_states), len(teacher_states))]
            variance = (target.square() * not_padding).sum()
            error = error + ((state - target).square() * not_padding).sum() / variance
        return loss(network, batch) + weight * error / len(student_states)

    return combined_loss


def teacher_layer(student_layer: int, student_layers: int, teacher_layers: int) -> int:
    """Return the index of the teacher layer that a student layer imitates; the last maps to the last."""
    return round((student_layer + 1) * teacher_layers / student_layers) - 1


def _hidden_states(network: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Return the hidden states after every layer, shape (windows, tokens, hidden) each."""
    output: Mapping[str, Any] = network.get_decoder()(ids, use_cache=False, output_hidden_states=True)
    states: tuple[Tensor, ...] = output["hidden_states"]
    return states[1:]
