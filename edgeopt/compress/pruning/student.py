"""A smaller dense model cut from a larger one, as the start of a distillation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows, norm_sum_of_squares
from edgeopt.compress.preconditions import require_dense, require_float, require_positive
from edgeopt.compress.pruning.activation_energy import ActivationEnergy
from edgeopt.compress.pruning.importance import Importance, require_scores
from edgeopt.compress.pruning.prune_heads import keep_groups
from edgeopt.compress.pruning.prune_width import most_important
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.model_spec import LayerSpec, ModelSpec
    from edgeopt.core.protocols import CompressionContext

SIZES = ("layers", "hidden_size", "intermediate_size", "kv_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """Cut a student of given sizes from the model, its teacher (Minitron, arXiv 2407.14679); a distill step follows.

    Layers are taken evenly, the first and the last among them; hidden channels by the energy of all norms' outputs;
    MLP channels and key-value groups by `importance`. Head size and query heads a group stay as they are. Each size
    that is left open is the teacher's.

    Attributes:
        hidden_size: a multiple of the student's query heads, which transformers asks for.
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
            if (value := getattr(self, name)) is not None:
                require_positive(value, name)
        require_scores(self.importance, "mlp")
        require_scores(self.importance, "attention")

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "student")
        require_dense(spec, "student")
        present = {
            "layers": len(spec.layers),
            "hidden_size": spec.hidden_size,
            "intermediate_size": min(layer.intermediate_size for layer in spec.layers),
            "kv_heads": min(layer.kv_heads for layer in spec.layers),
        }
        for name, most in present.items():
            if (value := getattr(self, name)) is not None and value > most:
                raise ConfigError(
                    f"{value} is more than the teacher's {most}", location=name, hint=f"Give at most {most}"
                )
        kept = evenly(len(spec.layers), self.layers or len(spec.layers))
        after = replace(
            spec,
            hidden_size=self.hidden_size or spec.hidden_size,
            layers=tuple(self._narrowed(spec.layers[number]) for number in kept),
        )
        if after == spec:
            raise ConfigError(
                "the student is as large as its teacher", location="hidden_size", hint=f"Give one of {', '.join(SIZES)}"
            )
        heads = after.layers[0].heads
        if self.hidden_size is not None and after.hidden_size % heads:
            raise ConfigError(
                f"{after.hidden_size} is no multiple of the {heads} query heads",
                location="hidden_size",
                hint=f"Give {max(1, after.hidden_size // heads) * heads}",
            )
        return after

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        network, spec = modeling.load(checkpoint), self.plan(checkpoint.spec)
        modeling.require_separate_projections(network, "student")
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        context.progress(f"scoring channels on {len(windows)} windows of calibration text")
        channels = self.importance.scores(network, windows, "mlp")
        heads = self.importance.scores(network, windows, "attention")
        hidden = most_important(norm_sum_of_squares(network, windows), spec.hidden_size)
        kept = evenly(len(checkpoint.spec.layers), len(spec.layers))
        modeling.keep_layers(network, kept)
        for layer, sizes, number in zip(modeling.layers(network), spec.layers, kept, strict=True):
            modeling.keep_channels(layer.mlp, most_important(channels[number], sizes.intermediate_size))
            keep_groups(layer.self_attn, heads[number], sizes.kv_heads, spec.head_size)
        keep_hidden(network, hidden)
        modeling.save(network, directory, checkpoint, spec)
        report = {"kept_layers": kept, "kept_hidden_channels": hidden.tolist()}
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "student.json").write_text(json.dumps(report) + "\n")
        return spec

    def _narrowed(self, layer: LayerSpec) -> LayerSpec:
        kv_heads = self.kv_heads or layer.kv_heads
        return replace(
            layer,
            intermediate_size=self.intermediate_size or layer.intermediate_size,
            kv_heads=kv_heads,
            heads=kv_heads * (layer.heads // layer.kv_heads),
        )


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count` at equal distances, the first and the last among them; of one the last."""
    return [count - 1] if wanted == 1 else [round(n * (count - 1) / (wanted - 1)) for n in range(wanted)]


def keep_hidden(network: PreTrainedModel, index: Tensor) -> None:
    """Keep the channels of the residual stream in `index` in all that writes to it or reads from it."""
    from torch import nn

    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[:, index].clone(), requires_grad=False)
    embedding.embedding_dim = len(index)
    modeling.keep_columns(head, index)
    if tied:
        head.weight = embedding.weight
    for layer in modeling.layers(network):
        attention, mlp = layer.self_attn, layer.mlp
        for reading in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            modeling.keep_columns(reading, index)
        for writing in (attention.o_proj, mlp.down_proj):
            modeling.keep_rows(writing, index)
    for norm in modeling.norms(network):
        norm.weight = nn.Parameter(norm.weight[index].clone(), requires_grad=False)
    network.config.hidden_size = len(index)
