"""Low-rank adaptation, merged into the weights or kept beside them as one of several adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRank
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_dense, require_float, require_no_kv_cache
from edgeopt.compress.recovery import loftq
from edgeopt.compress.recovery.teacher_logits import TaughtTraining
from edgeopt.compress.recovery.training import device
from edgeopt.core.config_objects import to_config
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, PROJECTIONS, Adapter, ModelSpec
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

TARGETS = tuple(name for unit in PROJECTIONS.values() for name in unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(TaughtTraining):
    """Train low-rank updates of the projections on calibration text (LoRA, arXiv 2106.09685), by peft.

    They learn from the uncompressed model, whose predictions say more of a short text than the text itself; with
    `truth_weight=1` from the text alone, as an adapter to a use of its own does.

    Attributes:
        rank: 2 to 64, and no larger than the smallest adapted matrix.
        alpha: the update is scaled by alpha / rank, or by alpha / √rank with `rank_stabilized` (rsLoRA,
            arXiv 2312.03732), which keeps high ranks from learning slowly.
        decomposed: train magnitude and direction of each row apart (DoRA, arXiv 2402.09353).
        merge: add the update to the weights. Otherwise they stay as they are, rounded ones too (QLoRA, arXiv
            2305.14314), and each request may choose the adapter by its `name`; it costs time with every token.
        initialization: the usual one, an update of zero, or `loftq`, where it makes up for rounding.
    """

    truth_weight: float = 0.3
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    decomposed: bool = False
    targets: tuple[str, ...] = TARGETS
    merge: bool = True
    name: str = "default"
    initialization: Literal["default", "loftq"] = "default"

    def __post_init__(self) -> None:
        TaughtTraining.__post_init__(self)
        if not 2 <= self.rank <= 64:
            raise ConfigError(f"{self.rank} is outside its range", location="rank", hint="Give a rank from 2 to 64")
        if self.alpha <= 0:
            raise ConfigError(f"{self.alpha} is outside its range", location="alpha", hint="Give more than 0")
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(
                f"{unknown or 'no'} projections", location="targets", hint=f"Choose from {', '.join(TARGETS)}"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ConfigError(
                f"{self.name!r} is no name of an adapter", location="name", hint="Give letters, digits, _ and - alone"
            )
        if self.decomposed and not self.merge:
            raise ConfigError(
                "DoRA scales every row of the sum, which no low-rank update beside the weights can do",
                location="decomposed",
                hint="Set decomposed=false, or merge=true",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        if self.merge:
            require_float(spec, "lora", fallback="keep the adapter apart with merge=false")
            require_dense(spec, "lora", hint="Put lora before sparsify, or keep the adapter apart with merge=false")
        require_no_kv_cache(spec, "lora")
        if any(grid.inputs == "static" for grid in spec.schemes.values()):
            raise ConfigError(
                "lora cannot follow ranges of inputs from calibration text, which were taken without the adapter",
                location="order",
                hint="Round inputs with ranges=dynamic",
            )
        if self.name in spec.adapters:
            raise ConfigError(f"there is an adapter {self.name!r} already", location="name", hint="Give another name")
        if self.initialization == "loftq" and not any(name not in (LM_HEAD, EMBEDDING) for name in spec.schemes):
            raise ConfigError(
                "loftq makes up for rounding, and the layers are not rounded",
                location="initialization",
                hint="Put a quantize step before lora, or set initialization=default",
            )
        smallest = min(
            min(spec.hidden_size, layer.intermediate_size, layer.kv_heads * spec.head_size) for layer in spec.layers
        )
        if self.rank > smallest:
            raise ConfigError(
                f"rank {self.rank} exceeds the smallest matrix side {smallest}",
                location="rank",
                hint=f"Give at most {smallest}",
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
            target_modules=modules(network, self.targets),
            lora_dropout=0.0,
            use_rslora=self.rank_stabilized,
            use_dora=self.decomposed,
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(network.to(device()), config)
        if self.initialization == "loftq":
            context.progress("fitting updates to what rounding lost")
            make_up(adapted.get_base_model(), modeling.load(context.floating))
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        loss = self.loss(context.original, windows, context)
        known = (checkpoint, context.original, context.floating, context.calibration)
        with context.cache.draft(["lora", *(part.digest for part in known), to_config(self)]) as draft:
            losses = self.fit(adapted, loss, len(windows), context.progress, draft)
        artifacts = directory / "artifacts"
        keep(adapted, artifacts / "adapter")
        (artifacts / "lora_loss.json").write_text(json.dumps(losses) + "\n")
        if self.merge:
            modeling.save(adapted.merge_and_unload().cpu(), directory, checkpoint, checkpoint.spec)
        else:
            modeling.link(checkpoint, directory)
            adapters.write(updates(adapted.get_base_model().cpu()), directory, self.name)
        return self.plan(checkpoint.spec)


def modules(network: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Names of the modules that hold the projections `targets`, in whole where a family stacks several in one."""
    found = []
    for unit, names in modeling.units(network).items():
        projections = PROJECTIONS.get(unit.rpartition(".")[2], ())
        if len(names) == len(projections):
            found += [name for name, projection in zip(names, projections, strict=True) if projection in targets]
        elif any(projection in targets for projection in projections):
            found += names
    return found


def keep(adapted: Any, folder: Path) -> None:
    """What was trained in peft's own form, whose list of modules comes in another order every time."""
    adapted.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": sorted(config["target_modules"])}, indent=1) + "\n")


def updates(network: PreTrainedModel) -> dict[str, LowRank]:
    """What peft trained in `network`, by the names of the modules."""
    return {
        name: LowRank(
            down=layer.lora_A["default"].weight.detach(),
            up=layer.scaling["default"] * layer.lora_B["default"].weight.detach(),
        )
        for name, layer in _adapted(network)
    }


def make_up(network: PreTrainedModel, floating: PreTrainedModel) -> None:
    """Start peft's updates in `network` at what its rounded weights lack of those in `floating`, as far as ranks go."""
    import torch

    for name, layer in _adapted(network):
        weight = layer.get_base_layer().weight
        residual = floating.get_submodule(name).weight.to(weight.device) - weight
        if residual.any():  # a factor of zeros on both sides would never learn
            start = loftq.nearest(residual, layer.r["default"])
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(start.down)
                layer.lora_B["default"].weight.copy_(start.up / layer.scaling["default"])


def _adapted(network: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))
