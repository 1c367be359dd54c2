from __future__ import annotations

import dataclasses

import pytest

from edgeopt.core import target_aliases
from edgeopt.core.config_objects import instantiate, resolve, to_config
from edgeopt.core.target_aliases import ALIASES, FIELD_ALIASES
from edgeopt.errors import ConfigError

SEALED_AT_49994E4 = [
    "edgeopt.compress.pruning.activation_energy.ActivationEnergy",
    "edgeopt.compress.pruning.block_influence.BlockInfluence",
    "edgeopt.compress.pruning.prune_depth.PruneDepth",
    "edgeopt.compress.pruning.prune_gradually.PruneGradually",
    "edgeopt.compress.pruning.prune_heads.PruneHeads",
    "edgeopt.compress.pruning.prune_width.PruneWidth",
    "edgeopt.compress.pruning.sparsify.Sparsify",
    "edgeopt.compress.pruning.student.Student",
    "edgeopt.compress.pruning.taylor.Taylor",
    "edgeopt.compress.pruning.wanda.Wanda",
    "edgeopt.compress.quantization.awq.Awq",
    "edgeopt.compress.quantization.gptq.Gptq",
    "edgeopt.compress.quantization.hqq.Hqq",
    "edgeopt.compress.quantization.int8.Int8",
    "edgeopt.compress.quantization.k_quant.KQuant",
    "edgeopt.compress.quantization.kv_cache.KvCache",
    "edgeopt.compress.quantization.llama_quantize.LlamaQuantize",
    "edgeopt.compress.quantization.mixed_precision.MixedPrecision",
    "edgeopt.compress.quantization.qat.Qat",
    "edgeopt.compress.quantization.quantize.Quantize",
    "edgeopt.compress.quantization.rtn.Rtn",
    "edgeopt.compress.quantization.smooth_quant.SmoothQuant",
    "edgeopt.compress.recovery.distill.Distill",
    "edgeopt.compress.recovery.lora.Lora",
    "edgeopt.kernels.Kernels",
    "edgeopt.measure.bench.Bench",
    "edgeopt.measure.continuations.Continuations",
    "edgeopt.measure.energy.Energy",
    "edgeopt.measure.latency.Latency",
    "edgeopt.measure.memory.Memory",
    "edgeopt.measure.parity.Parity",
    "edgeopt.measure.quality.Quality",
    "edgeopt.measure.size.Size",
    "edgeopt.measure.tasks.Tasks",
    "edgeopt.models.hub.HubModel",
    "edgeopt.models.local.LocalFolder",
    "edgeopt.models.reference.ReferenceModel",
    "edgeopt.models.registry.RegisteredModel",
    "edgeopt.release.gates.champion.NotWorse",
    "edgeopt.release.gates.limits.Within",
    "edgeopt.release.gates.lint.LintClean",
    "edgeopt.release.gates.metrics.RequiredMetrics",
    "edgeopt.release.gates.remeasured.Remeasured",
    "edgeopt.runtimes.eager.Torch",
    "edgeopt.runtimes.genai.Genai",
    "edgeopt.runtimes.llamacpp.LlamaCpp",
    "edgeopt.runtimes.portable.PortableOnnx",
    "edgeopt.runtimes.tensorrt.TensorRt",
    "edgeopt.search.definition.Search",
    "edgeopt.spec.Grid",
    "edgeopt.target.Device",
    "edgeopt.target.Target",
    "edgeopt.texts.bundled.BundledText",
    "edgeopt.texts.file.TextFile",
    "edgeopt.texts.hub.HubText",
    "edgeopt.tracking.recorder.MlflowRecorder",
]
"""Every `_target_` that commit 49994e4 could write into a manifest, a run or a study."""


@pytest.mark.parametrize("target", sorted({*SEALED_AT_49994E4, *ALIASES}))
def test_sealed_target_resolves(target: str) -> None:
    assert dataclasses.is_dataclass(resolve(target))


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_alias_names_current_class(old: str, new: str) -> None:
    config_class = resolve(new)
    assert f"{config_class.__module__}.{config_class.__qualname__}" == new, "an alias must not point to another alias"
    assert resolve(old) is config_class


def test_field_aliases_name_current_fields() -> None:
    for target, renamed in FIELD_ALIASES.items():
        fields = {field.name for field in dataclasses.fields(resolve(target))}
        assert set(renamed.values()) <= fields, target
        assert not fields & set(renamed), target


def test_moved_class_seals_its_new_path() -> None:
    moved = instantiate({"_target_": "edgeopt.measure.size.Size"})
    assert to_config(moved)["_target_"] == "edgeopt.measure.probes.size.Size"


def test_renamed_field_accepts_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_aliases, "FIELD_ALIASES", {"edgeopt.models.local.LocalFolder": {"folder": "path"}})
    assert instantiate({"_target_": "edgeopt.models.local.LocalFolder", "folder": "m"}).path == "m"


def test_aliases_do_not_bypass_the_allowlist() -> None:
    with pytest.raises(ConfigError, match="must name a class of edgeopt"):
        resolve("os.system")
