"""Test LoRA training, merging, separate adapters and LoftQ initialization."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtimes.test_families import FAMILIES, random_checkpoint
from support.stages import compression_context

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.qat import Qat
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.recovery.loftq import truncated_svd
from edgeopt.compress.recovery.lora import Lora, target_modules
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.corpus import Text
from edgeopt.core.model_spec import Adapter
from edgeopt.errors import ConfigError

SHORT = {"tokens": 384, "batch_tokens": 128, "window_tokens": 64}


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def calibration() -> Text:
    return Text(name="calibration", documents=tuple("for item in items:\n    print(item)\n" * 8 for _ in range(6)))


def test_merged_weights_have_lower_loss(checkpoint, calibration, tmp_path):
    step = Lora(rank=8, tokens=7680, learning_rate=0.02, batch_tokens=256, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, compression_context(checkpoint, calibration))
    after = Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={})
    windows = calibration_windows(checkpoint, calibration, count=8, length=64)
    loss_before, loss_after = (
        next_token_loss(windows)(modeling.load(c), range(len(windows))).item() for c in (checkpoint, after)
    )
    assert loss_after < loss_before - 0.5


def test_saved_adapter_equals_merged_weights(checkpoint, calibration, tmp_path):
    from peft import PeftModel

    step = Lora(rank=4, **SHORT)
    spec = step.apply(checkpoint, tmp_path, compression_context(checkpoint, calibration))
    merged = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    adapted = PeftModel.from_pretrained(modeling.load(checkpoint), tmp_path / "artifacts" / "adapter")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "artifacts" / "adapter").glob("*.bin"))
    config = json.loads((tmp_path / "artifacts" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]), "the order of a set differs between processes"


def apply_step(step, checkpoint, calibration, directory, float_checkpoint=None) -> Checkpoint:
    directory.mkdir()
    context = replace(compression_context(checkpoint, calibration), float_checkpoint=float_checkpoint or checkpoint)
    spec = step.apply(checkpoint, directory, context)
    assert spec == step.plan(checkpoint.spec)
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


def loss(network, updates, windows) -> float:
    with torch.no_grad(), adapters.attached(network, updates):
        return next_token_loss(windows)(network, range(len(windows))).item()


@pytest.fixture(scope="module")
def quantized(checkpoint, calibration, tmp_path_factory) -> Checkpoint:
    """Return a checkpoint quantized to 2 bits, so that the quantization error is large."""
    step = Quantize(weights="int2", block_size=32, lm_head="float", embedding="float")
    return apply_step(step, checkpoint, calibration, tmp_path_factory.mktemp("quantized") / "int2")


def test_separate_adapter_keeps_quantized_weights(checkpoint, quantized, calibration, tmp_path):
    step = Lora(rank=8, merge=False, tokens=7680, learning_rate=0.02, batch_tokens=256, window_tokens=64)
    after = apply_step(step, quantized, calibration, tmp_path / "after", float_checkpoint=checkpoint)
    assert (after.directory / "model.safetensors").read_bytes() == (
        quantized.directory / "model.safetensors"
    ).read_bytes()
    windows = calibration_windows(checkpoint, calibration, count=8, length=64)
    network, updates = modeling.load(after), adapters.read(after.directory, "default")
    assert loss(network, updates, windows) < loss(network, {}, windows) - 0.3


def test_adapters_train_independently(checkpoint, calibration, tmp_path):
    one = apply_step(Lora(rank=4, merge=False, name="one", **SHORT), checkpoint, calibration, tmp_path / "one")
    both = apply_step(Lora(rank=2, merge=False, name="two", **SHORT), one, calibration, tmp_path / "both")
    alone = apply_step(Lora(rank=2, merge=False, name="two", **SHORT), checkpoint, calibration, tmp_path / "alone")
    assert {name: adapter.rank for name, adapter in both.spec.adapters.items()} == {"one": 4, "two": 2}
    for folder, name in ((one, "one"), (alone, "two")):
        expected = (folder.directory / "adapters" / f"{name}.safetensors").read_bytes()
        assert (both.directory / "adapters" / f"{name}.safetensors").read_bytes() == expected


def test_separate_and_merged_updates_are_equal(checkpoint, calibration, tmp_path):
    values = {"rank": 4, "rank_stabilized": True, "alpha": 4.0, "learning_rate": 0.02, **SHORT}
    merged = modeling.load(apply_step(Lora(**values), checkpoint, calibration, tmp_path / "merged"))
    separate = apply_step(Lora(**values, merge=False), checkpoint, calibration, tmp_path / "separate")
    network = modeling.load(separate)
    for name, update in adapters.read(separate.directory, "default").items():
        expected = merged.get_submodule(name).weight - network.get_submodule(name).weight
        torch.testing.assert_close(update.weight, expected, rtol=1e-3, atol=1e-6)


def test_fused_projections_are_trained_as_one_module(tiny_model, calibration, tmp_path):
    (tmp_path / "phi").mkdir()
    (tmp_path / "in").mkdir()
    phi = import_checkpoint(random_checkpoint(*FAMILIES["phi3"], tiny_model, tmp_path / "phi"), tmp_path / "in")
    step = Lora(rank=2, merge=False, targets=("q_proj", "up_proj"), learning_rate=0.02, **SHORT)
    updates = adapters.read(apply_step(step, phi, calibration, tmp_path / "out").directory, "default")
    assert {name.rpartition(".")[2] for name in updates} == {"qkv_proj", "gate_up_proj"}
    assert all(update.weight.any() for update in updates.values())


@given(rows=st.integers(2, 12), columns=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_truncated_svd_is_best_low_rank_approximation(rows, columns, rank, seed):
    """The least error of rank r is the sum of the squared singular values beyond the r-th (Eckart-Young)."""
    residual = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    update = truncated_svd(residual, rank)
    truncated_values = np.linalg.svd(residual.numpy().astype(np.float64), compute_uv=False)[rank:]
    error = (residual - update.weight).square().sum().item()
    assert update.down.shape[0] == update.up.shape[1] == min(rank, rows, columns)
    assert error == pytest.approx((truncated_values**2).sum(), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(update.down @ update.down.T, update.up.T @ update.up, rtol=1e-3, atol=1e-4)


def test_loftq_starts_from_quantization_error(checkpoint, quantized, calibration, tmp_path):
    step = Lora(rank=8, merge=False, initialization="loftq", learning_rate=1e-12, **SHORT)
    after = apply_step(step, quantized, calibration, tmp_path / "after", float_checkpoint=checkpoint)
    network, float_network = modeling.load(quantized), modeling.load(checkpoint)
    updates = adapters.read(after.directory, "default")
    assert updates.keys() == set(target_modules(network, Lora().targets))
    for name, update in updates.items():
        residual = float_network.get_submodule(name).weight - network.get_submodule(name).weight
        expected = truncated_svd(residual, 8).weight
        torch.testing.assert_close(update.weight, expected, rtol=1e-3, atol=1e-5)


def test_loftq_trains_float_layers_too(checkpoint, calibration, tmp_path):
    partly_quantized = apply_step(
        Quantize(weights="int4", block_size=16, overrides={"layers.0.*": "float"}),
        checkpoint,
        calibration,
        tmp_path / "quantized",
    )
    step = Lora(rank=2, merge=False, initialization="loftq", learning_rate=0.02, **SHORT)
    after = apply_step(step, partly_quantized, calibration, tmp_path / "after", float_checkpoint=checkpoint)
    assert all(update.weight.any() for update in adapters.read(after.directory, "default").values())


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"rank": 1}, "rank"),
        ({"rank": 65}, "rank"),
        ({"tokens": 0}, "tokens"),
        ({"alpha": 0.0}, "alpha"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"targets": ("nope",)}, "targets"),
        ({"targets": ()}, "targets"),
        ({"name": "../up"}, "name"),
        ({"name": ""}, "name"),
        ({"merge": False, "decomposed": True}, "decomposed"),
    ],
)
def test_invalid_values_are_rejected(values, location):
    with pytest.raises(ConfigError) as error:
        Lora(**values)
    assert error.value.location == location


def test_rank_above_smallest_matrix_side_is_rejected(checkpoint):
    with pytest.raises(ConfigError, match="at most the smallest matrix side 32, got 48"):
        Lora(rank=48).plan(checkpoint.spec)


class TestStepOrder:
    def test_merging_into_quantized_weights_is_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match=r"already quantized.*merge=false"):
            Lora().plan(Quantize().plan(checkpoint.spec))

    def test_separate_adapter_follows_quantize_before_kv_cache(self, checkpoint):
        spec = KvCache().plan(Lora(rank=4, merge=False, name="tests").plan(Quantize().plan(checkpoint.spec)))
        assert spec.adapters == {"tests": Adapter(rank=4, targets=Lora().targets)}
        with pytest.raises(ConfigError, match="cannot follow kv_cache"):
            Lora(merge=False).plan(spec)

    def test_qat_after_separate_adapter_is_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match="qat cannot follow lora with merge=false"):
            Qat().plan(Lora(merge=False).plan(Quantize().plan(checkpoint.spec)))

    def test_duplicate_adapter_name_is_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match="unique among the adapters, got 'default' twice"):
            Lora(merge=False).plan(Lora(merge=False).plan(checkpoint.spec))

    def test_loftq_requires_quantized_layers(self, checkpoint):
        with pytest.raises(ConfigError, match="the layers are not quantized"):
            Lora(merge=False, initialization="loftq").plan(checkpoint.spec)

    def test_static_input_ranges_before_lora_are_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match="calibrated without the adapter"):
            Lora(merge=False).plan(Int8(ranges="min_max").plan(checkpoint.spec))
