"""Train low-rank adapters, and merge them into the weights or keep them separate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRankUpdate
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_float, require_no_kv_cache
from edgeopt.compress.recovery import loftq
from edgeopt.compress.recovery.teacher_logits import DistillationTraining
from edgeopt.compress.recovery.training import training_device
from edgeopt.core.config_objects import to_config
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, PROJECTIONS, Adapter, ModelSpec
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

PROJECTION_NAMES = tuple(name for unit in PROJECTIONS.values() for name in unit)
"""Projections of a decoder layer that can be adapted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(DistillationTraining):
    """Train low-rank updates of the projections on calibration text (LoRA, arXiv 2106.09685), with peft.

    By default the updates learn from the predictions of the uncompressed model, which carry more information about
    a short text than the text itself. With `truth_weight=1` they learn from the text only, which suits an adapter
    for another task.

    Attributes:
        rank: 2 to 64, and at most the smallest matrix side of all layers.
        alpha: numerator of the update's scale, which is alpha / rank.
        rank_stabilized: scale by alpha / √rank instead, so that high ranks do not learn slowly (rsLoRA,
            arXiv 2312.03732).
        decomposed: train the magnitude and the direction of each row separately (DoRA, arXiv 2402.09353).
        targets: projections to adapt.
        merge: add the update to the weights. If false, the weights stay unchanged and may be quantized (QLoRA, arXiv
            2305.14314). Each request can then select the adapter by `name`, which takes more time per token.
        name: name of the adapter if it is not merged.
        initialization: `default` starts from an update of zero; `loftq` starts from the update that compensates
            quantization error.
    """

    truth_weight: float = 0.3
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    decomposed: bool = False
    targets: tuple[str, ...] = PROJECTION_NAMES
    merge: bool = True
    name: str = "default"
    initialization: Literal["default", "loftq"] = "default"

    def __post_init__(self) -> None:
        DistillationTraining.__post_init__(self)
        if not 2 <= self.rank <= 64:
            raise ConfigError(f"`rank` must be from 2 to 64, got {self.rank}", location="rank", hint="Use 8 or 16")
        if self.alpha <= 0:
            raise ConfigError(
                f"`alpha` must be greater than 0, got {self.alpha}",
                location="alpha",
                hint="Use a value such as twice the rank",
            )
        unknown = [name for name in self.targets if name not in PROJECTION_NAMES]
        if unknown or not self.targets:
            raise ConfigError(
                f"`targets` must name one or more projections, got {', '.join(unknown) or 'none'}",
                location="targets",
                hint=f"Use one or more of {', '.join(PROJECTION_NAMES)}",
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ConfigError(
                f"`name` must consist of letters, digits, _ and -, and start with a letter or digit, got {self.name!r}",
                location="name",
                hint="Use a name such as 'default'",
            )
        if self.decomposed and not self.merge:
            raise ConfigError(
                "`decomposed` must be false when the adapter is not merged: DoRA rescales the sum of weight and "
                "update, which a separate low-rank update cannot express",
                location="decomposed",
                hint="Set decomposed=false or merge=true",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        if self.merge:
            require_float(spec, "lora", alternative="keep the adapter separate with merge=false")
            require_dense(spec, "lora", hint="Put lora before sparsify, or keep the adapter separate with merge=false")
        require_no_kv_cache(spec, "lora")
        if any(scheme.inputs == "static" for scheme in spec.schemes.values()):
            raise ConfigError(
                "lora cannot follow quantization with static input ranges, which were calibrated without the adapter",
                location="order",
                hint="Use ranges=dynamic for activations",
            )
        if self.name in spec.adapters:
            raise ConfigError(
                f"`name` must be unique among the adapters, got {self.name!r} twice",
                location="name",
                hint="Use another name",
            )
        if self.initialization == "loftq" and not any(name not in (LM_HEAD, EMBEDDING) for name in spec.schemes):
            raise ConfigError(
                "`initialization` must be default when the layers are not quantized, got loftq",
                location="initialization",
                hint="Put a quantize step before lora, or set initialization=default",
            )
        smallest = min(
            min(spec.hidden_size, layer.intermediate_size, layer.kv_heads * spec.head_size) for layer in spec.layers
        )
        if self.rank > smallest:
            raise ConfigError(
                f"`rank` must be at most the smallest matrix side {smallest}, got {self.rank}",
                location="rank",
                hint=f"Use at most {smallest}",
            )
        if self.merge:
            return spec
        added = Adapter(rank=self.rank, targets=self.targets)
        return replace(spec, adapters={**spec.adapters, self.name: added})

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.seed)
        network = modeling.load(checkpoint)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=target_modules(network, self.targets),
            lora_dropout=0.0,
            use_rslora=self.rank_stabilized,
            use_dora=self.decomposed,
            task_type="CAUSAL_LM",
        )
        peft_model: Any = get_peft_model(network.to(training_device()), config)
        if self.initialization == "loftq":
            context.progress("initializing the adapter from quantization error")
            initialize_loftq(peft_model.get_base_model(), modeling.load(context.float_checkpoint))
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        loss = self.loss(context.original, windows, context)
        sources = (checkpoint, context.original, context.float_checkpoint, context.calibration)
        with context.cache.resumable_folder(["lora", *(source.digest for source in sources), to_config(self)]) as draft:
            losses = self.fit(peft_model, loss, len(windows), context.progress, draft)
        artifacts = directory / "artifacts"
        save_peft_adapter(peft_model, artifacts / "adapter")
        (artifacts / "lora_loss.json").write_text(json.dumps(losses) + "\n")
        if self.merge:
            modeling.save(peft_model.merge_and_unload().cpu(), directory, checkpoint, checkpoint.spec)
        else:
            modeling.link_checkpoint(checkpoint, directory)
            adapters.write(extract_updates(peft_model.get_base_model().cpu()), directory, self.name)
        return self.plan(checkpoint.spec)


def target_modules(network: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Return the names of the modules that contain the projections `targets`.

    A module that fuses several projections is included as a whole.
    """
    selected = []
    for unit, module_names in modeling.unit_modules(network).items():
        projections = PROJECTIONS.get(unit.rpartition(".")[2], ())
        if len(module_names) == len(projections):
            selected += [
                name for name, projection in zip(module_names, projections, strict=True) if projection in targets
            ]
        elif any(projection in targets for projection in projections):
            selected += module_names
    return selected


def save_peft_adapter(peft_model: Any, folder: Path) -> None:
    """Write the trained adapter in peft's format, with deterministic bytes.

    peft keeps its target modules in a set, whose order differs between processes, so they are sorted here.
    """
    peft_model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": sorted(config["target_modules"])}, indent=1) + "\n")


def extract_updates(network: PreTrainedModel) -> dict[str, LowRankUpdate]:
    """Return the low-rank updates that peft trained in `network`, by module name."""
    return {
        name: LowRankUpdate(
            down=layer.lora_A["default"].weight.detach(),
            up=layer.scaling["default"] * layer.lora_B["default"].weight.detach(),
        )
        for name, layer in _lora_layers(network)
    }


def initialize_loftq(network: PreTrainedModel, float_network: PreTrainedModel) -> None:
    """Initialize each update in `network` with the quantization error, truncated to the rank of the update.

    Args:
        network: peft's base model with quantized weights.
        float_network: the same network with the weights before quantization.
    """
    import torch

    for name, layer in _lora_layers(network):
        weight = layer.get_base_layer().weight
        residual = float_network.get_submodule(name).weight.to(weight.device) - weight
        if residual.any():  # a zero residual would make both factors zero, and then both gradients stay zero
            update = loftq.truncated_svd(residual, layer.r["default"])
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(update.down)
                layer.lora_B["default"].weight.copy_(update.up / layer.scaling["default"])


def _lora_layers(network: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Return name and module of each layer that peft adapts."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))
