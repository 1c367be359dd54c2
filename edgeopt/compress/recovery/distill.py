"""Knowledge distillation: a smaller model learns to predict what a larger one predicts."""

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
from edgeopt.compress.recovery.teacher_logits import TaughtTraining
from edgeopt.compress.recovery.training import device
from edgeopt.core.config_objects import to_config
from edgeopt.core.protocols import ModelSource
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(TaughtTraining):
    """Train all weights towards the teacher's predictions on calibration text (arXiv 1503.02531).

    Attributes:
        teacher: a model with the same vocabulary; left open, the recipe's uncompressed model.
        hidden_weight: weight of the squared error of hidden states after each layer, as a share of the teacher's
            variance (TinyBERT, arXiv 1909.10351); layers are mapped evenly. Asks the teacher anew in each step.
    """

    learning_rate: float = 5e-4
    teacher: ModelSource | None = None
    truth_weight: float = 0.3
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        TaughtTraining.__post_init__(self)
        if self.hidden_weight < 0:
            raise ConfigError(
                f"{self.hidden_weight} is outside its range", location="hidden_weight", hint="Give 0 or more"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "distill")
        require_dense(spec, "distill")
        return spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        torch.manual_seed(self.seed)
        teacher = self._teacher(checkpoint, context)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        loss = self.loss(teacher, windows, context)
        network = modeling.load(checkpoint).requires_grad_(True).to(device())
        if self.hidden_weight:
            self._require_alike(checkpoint, teacher)
            loss = with_hidden_states(loss, modeling.load(teacher).to(device()), windows, self.hidden_weight)
        inputs = ["distill", checkpoint.digest, teacher.digest, context.calibration.digest, to_config(self)]
        with context.cache.draft(inputs) as draft:
            losses = self.fit(network, loss, len(windows), context.progress, draft)
        modeling.save(network.cpu(), directory, checkpoint, checkpoint.spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "distill_loss.json").write_text(json.dumps(losses) + "\n")
        return checkpoint.spec

    def _require_alike(self, student: Checkpoint, teacher: Checkpoint) -> None:
        theirs, own = teacher.spec.hidden_size, student.spec.hidden_size
        if theirs != own:
            raise ConfigError(
                f"the teacher has {theirs} hidden channels and the model {own}, which cannot be compared",
                location="hidden_weight",
                hint="Give 0, so that predictions alone are learnt",
            )

    def _teacher(self, checkpoint: Checkpoint, context: CompressionContext) -> Checkpoint:
        if self.teacher is None:
            return context.original
        teacher = importing.import_checkpoint(self.teacher.locate(), Path(tempfile.mkdtemp(prefix="edgeopt-teacher-")))
        theirs, own = teacher.spec.vocabulary_size, checkpoint.spec.vocabulary_size
        if theirs != own:
            raise ConfigError(
                f"the teacher knows {theirs} tokens and the model {own}",
                location="teacher",
                hint="Give a teacher with the same tokenizer",
            )
        return teacher


def with_hidden_states(
    loss: LossFunction, teacher: nn.Module, windows: Sequence[Sequence[int]], weight: float
) -> LossFunction:
    """`loss` and the error of the student's hidden states against those of the mapped layers of `teacher`."""
    import torch

    def both(network: nn.Module, batch: Sequence[int]) -> Tensor:
        ids, labels = pad_batch([windows[n] for n in batch], next(network.parameters()).device)
        real = (labels != -100)[..., None]
        with torch.no_grad():
            wanted = _hidden(teacher, ids)
        found = _hidden(network, ids)
        error = torch.zeros((), device=ids.device)
        for number, state in enumerate(found):
            target = wanted[mapped(number, len(found), len(wanted))]
            variance = (target.square() * real).sum()
            error = error + ((state - target).square() * real).sum() / variance
        return loss(network, batch) + weight * error / len(found)

    return both


def mapped(layer: int, students: int, teachers: int) -> int:
    """The teacher's layer whose output a student's layer should produce; the last belongs to the last."""
    return round((layer + 1) * teachers / students) - 1


def _hidden(network: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Hidden states after every layer."""
    output: Mapping[str, Any] = network.get_decoder()(ids, use_cache=False, output_hidden_states=True)
    states: tuple[Tensor, ...] = output["hidden_states"]
    return states[1:]
