"""Cut a smaller dense model from a larger one, as the starting point of distillation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows, norm_sum_of_squares
from edgeopt.compress.preconditions import require_dense, require_float, require_positive
from edgeopt.compress.pruning.activation_energy import ActivationEnergy
from edgeopt.compress.pruning.importance import Importance, require_structure
from edgeopt.compress.pruning.prune_heads import keep_key_value_groups
from edgeopt.compress.pruning.prune_width import top_indices
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import LayerSpec, ModelSpec
    from edgeopt.core.protocols import CompressionContext

SIZES = ("layers", "hidden_size", "intermediate_size", "kv_heads")
"""Fields of Student that set a size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """Cut a student of given sizes from the model, its teacher (Minitron, arXiv 2407.14679).

    A distill step should follow. Layers are selected at equal distances, including the first and the last. Hidden
    channels are ranked by the energy of the outputs of all norms. MLP channels and key-value groups are ranked by
    `importance`. The head size and the number of query heads per group do not change. A size of null keeps the
    teacher's.

    Attributes:
        layers: number of decoder layers.
        hidden_size: channels of the residual stream; transformers requires a multiple of the student's query heads.
        intermediate_size: MLP channels of each layer.
        kv_heads: key-value heads of each layer.
        importance: score of MLP and attention channels.
        windows, window_tokens: number and length of the calibration windows that are scored.
    """

    layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    kv_heads: int | None = None
    importance: Importance = field(default_factory=ActivationEnergy)
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in (*SIZES, "windows", "window_tokens"):
            if (size := getattr(self, name)) is not None:
                require_positive(size, name)
        require_structure(self.importance, "mlp")
        require_structure(self.importance, "attention")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "student")
        require_dense(spec, "student")
        teacher_sizes = {
            "layers": len(spec.layers),
            "hidden_size": spec.hidden_size,
            "intermediate_size": min(layer.intermediate_size for layer in spec.layers),
            "kv_heads": min(layer.kv_heads for layer in spec.layers),
        }
        for name, teacher_size in teacher_sizes.items():
            if (size := getattr(self, name)) is not None and size > teacher_size:
                raise ConfigError(
                    f"`{name}` must be at most the teacher's {teacher_size}, got {size}",
                    location=name,
                    hint=f"Use at most {teacher_size}, or null to keep the teacher's size",
                )
        kept_layers = evenly_spaced_indices(len(spec.layers), self.layers or len(spec.layers))
        student_spec = replace(
            spec,
            hidden_size=self.hidden_size or spec.hidden_size,
            layers=tuple(self._shrink_layer(spec.layers[index]) for index in kept_layers),
        )
        if student_spec == spec:
            raise ConfigError(
                "The student must be smaller than its teacher, got the same sizes",
                location="hidden_size",
                hint=f"Set at least one of {', '.join(SIZES)}",
            )
        heads = student_spec.layers[0].heads
        if self.hidden_size is not None and student_spec.hidden_size % heads:
            raise ConfigError(
                f"`hidden_size` must be a multiple of the {heads} query heads, got {student_spec.hidden_size}",
                location="hidden_size",
                hint=f"Use {max(1, student_spec.hidden_size // heads) * heads}",
            )
        return student_spec

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        network, spec = modeling.load(checkpoint), self.plan(checkpoint.spec)
        modeling.require_separate_projections(network, "student")
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"scoring channels on {len(windows)} windows of calibration text")
        mlp_scores = self.importance.score(network, windows, "mlp")
        attention_scores = self.importance.score(network, windows, "attention")
        hidden_channels = top_indices(norm_sum_of_squares(network, windows), spec.hidden_size)
        kept_layers = evenly_spaced_indices(len(checkpoint.spec.layers), len(spec.layers))
        modeling.keep_layers(network, kept_layers)
        for layer, sizes, index in zip(modeling.layers(network), spec.layers, kept_layers, strict=True):
            modeling.keep_channels(layer.mlp, top_indices(mlp_scores[index], sizes.intermediate_size))
            keep_key_value_groups(layer.self_attn, attention_scores[index], sizes.kv_heads, spec.head_size)
        keep_hidden_channels(network, hidden_channels)
        modeling.save(network, directory, checkpoint, spec)
        report = {"kept_layers": kept_layers, "kept_hidden_channels": hidden_channels.tolist()}
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "student.json").write_text(json.dumps(report) + "\n")
        return spec

    def _shrink_layer(self, layer: LayerSpec) -> LayerSpec:
        kv_heads = self.kv_heads or layer.kv_heads
        return replace(
            layer,
            intermediate_size=self.intermediate_size or layer.intermediate_size,
            kv_heads=kv_heads,
            heads=kv_heads * (layer.heads // layer.kv_heads),
        )


def evenly_spaced_indices(length: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices into a sequence of `length`, including the first and the last.

    A count of 1 returns the last index.
    """
    return [length - 1] if count == 1 else [round(n * (length - 1) / (count - 1)) for n in range(count)]


def keep_hidden_channels(network: PreTrainedModel, channels: Tensor) -> None:
    """Keep these channels of the residual stream in every module that reads or writes it, in place.

    Args:
        network: a decoder with separate projections.
        channels: indices of the hidden channels to keep, int64, shape (kept,).
    """
    from torch import nn

    embedding: Any = network.get_input_embeddings()
    lm_head: Any = network.get_output_embeddings()
    tied = lm_head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[:, channels].clone(), requires_grad=False)
    embedding.embedding_dim = len(channels)
    modeling.keep_columns(lm_head, channels)
    if tied:
        lm_head.weight = embedding.weight
    for layer in modeling.layers(network):
        attention, mlp = layer.self_attn, layer.mlp
        for input_projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            modeling.keep_columns(input_projection, channels)
        for output_projection in (attention.o_proj, mlp.down_proj):
            modeling.keep_rows(output_projection, channels)
    for norm in modeling.norms(network):
        norm.weight = nn.Parameter(norm.weight[channels].clone(), requires_grad=False)
    network.config.hidden_size = len(channels)
