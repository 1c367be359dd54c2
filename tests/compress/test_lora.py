"""LoRA trains what it says, wins back quality, merges exactly, and stands beside weights as they are."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtimes.test_families import FAMILIES, random_checkpoint
from support.workshops import workshop

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.qat import Qat
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.recovery.loftq import nearest
from edgeopt.compress.recovery.lora import Lora, modules
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


def test_training_lowers_the_loss_and_the_merged_weights_keep_it(checkpoint, calibration, tmp_path):
    step = Lora(rank=8, tokens=7680, learning_rate=0.02, batch_tokens=256, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint, calibration))
    after = Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={})
    windows = calibration_windows(checkpoint, calibration, count=8, length=64)
    before, now = (next_token_loss(windows)(modeling.load(c), range(len(windows))).item() for c in (checkpoint, after))
    assert now < before - 0.5


def test_the_adapter_is_kept_and_equals_the_merged_weights(checkpoint, calibration, tmp_path):
    from peft import PeftModel

    step = Lora(rank=4, **SHORT)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint, calibration))
    merged = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    adapted = PeftModel.from_pretrained(modeling.load(checkpoint), tmp_path / "artifacts" / "adapter")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "artifacts" / "adapter").glob("*.bin"))
    config = json.loads((tmp_path / "artifacts" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]), "a set has another order in every process"


def applied(step, checkpoint, calibration, directory, floating=None) -> Checkpoint:
    directory.mkdir()
    context = replace(workshop(checkpoint, calibration), floating=floating or checkpoint)
    spec = step.apply(checkpoint, directory, context)
    assert spec == step.plan(checkpoint.spec)
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


def loss(network, updates, windows) -> float:
    with torch.no_grad(), adapters.attached(network, updates):
        return next_token_loss(windows)(network, range(len(windows))).item()


@pytest.fixture(scope="module")
def coarse(checkpoint, calibration, tmp_path_factory) -> Checkpoint:
    """Rounded so coarsely that there is something to make up for."""
    step = Quantize(weights="int2", block_size=32, lm_head="float", embedding="float")
    return applied(step, checkpoint, calibration, tmp_path_factory.mktemp("coarse") / "int2")


def test_an_adapter_beside_rounded_weights_learns_and_leaves_them_as_they_are(
    checkpoint, coarse, calibration, tmp_path
):
    step = Lora(rank=8, merge=False, tokens=7680, learning_rate=0.02, batch_tokens=256, window_tokens=64)
    after = applied(step, coarse, calibration, tmp_path / "after", floating=checkpoint)
    assert (after.directory / "model.safetensors").read_bytes() == (coarse.directory / "model.safetensors").read_bytes()
    windows = calibration_windows(checkpoint, calibration, count=8, length=64)
    network, updates = modeling.load(after), adapters.read(after.directory, "default")
    assert loss(network, updates, windows) < loss(network, {}, windows) - 0.3


def test_each_adapter_is_trained_on_the_base_alone(checkpoint, calibration, tmp_path):
    one = applied(Lora(rank=4, merge=False, name="one", **SHORT), checkpoint, calibration, tmp_path / "one")
    both = applied(Lora(rank=2, merge=False, name="two", **SHORT), one, calibration, tmp_path / "both")
    alone = applied(Lora(rank=2, merge=False, name="two", **SHORT), checkpoint, calibration, tmp_path / "alone")
    assert {name: adapter.rank for name, adapter in both.spec.adapters.items()} == {"one": 4, "two": 2}
    for folder, name in ((one, "one"), (alone, "two")):
        expected = (folder.directory / "adapters" / f"{name}.safetensors").read_bytes()
        assert (both.directory / "adapters" / f"{name}.safetensors").read_bytes() == expected


def test_beside_and_merged_are_the_same_update(checkpoint, calibration, tmp_path):
    values = {"rank": 4, "rank_stabilized": True, "alpha": 4.0, "learning_rate": 0.02, **SHORT}
    merged = modeling.load(applied(Lora(**values), checkpoint, calibration, tmp_path / "merged"))
    beside = applied(Lora(**values, merge=False), checkpoint, calibration, tmp_path / "beside")
    network = modeling.load(beside)
    for name, update in adapters.read(beside.directory, "default").items():
        expected = merged.get_submodule(name).weight - network.get_submodule(name).weight
        torch.testing.assert_close(update.weight, expected, rtol=1e-3, atol=1e-6)


def test_projections_that_a_family_stacks_are_trained_in_whole(tiny_model, calibration, tmp_path):
    (tmp_path / "phi").mkdir()
    (tmp_path / "in").mkdir()
    phi = import_checkpoint(random_checkpoint(*FAMILIES["phi3"], tiny_model, tmp_path / "phi"), tmp_path / "in")
    step = Lora(rank=2, merge=False, targets=("q_proj", "up_proj"), learning_rate=0.02, **SHORT)
    updates = adapters.read(applied(step, phi, calibration, tmp_path / "out").directory, "default")
    assert {name.rpartition(".")[2] for name in updates} == {"qkv_proj", "gate_up_proj"}
    assert all(update.weight.any() for update in updates.values())


@given(rows=st.integers(2, 12), columns=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_loftq_update_is_the_nearest_of_its_rank(rows, columns, rank, seed):
    """No update of rank r is nearer than the singular values beyond the r-th (Eckart-Young), here those of numpy."""
    residual = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = nearest(residual, rank)
    left = np.linalg.svd(residual.numpy().astype(np.float64), compute_uv=False)[rank:]
    lost = (residual - found.weight).square().sum().item()
    assert found.down.shape[0] == found.up.shape[1] == min(rank, rows, columns)
    assert lost == pytest.approx((left**2).sum(), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(found.down @ found.down.T, found.up.T @ found.up, rtol=1e-3, atol=1e-4)


def test_loftq_starts_nearer_to_the_weights_in_float(checkpoint, coarse, calibration, tmp_path):
    step = Lora(rank=8, merge=False, initialization="loftq", learning_rate=1e-12, **SHORT)
    after = applied(step, coarse, calibration, tmp_path / "after", floating=checkpoint)
    network, floating = modeling.load(coarse), modeling.load(checkpoint)
    updates = adapters.read(after.directory, "default")
    assert updates.keys() == set(modules(network, Lora().targets))
    for name, update in updates.items():
        lacking = floating.get_submodule(name).weight - network.get_submodule(name).weight
        expected = nearest(lacking, 8).weight
        torch.testing.assert_close(update.weight, expected, rtol=1e-3, atol=1e-5)


def test_loftq_leaves_matrices_that_are_not_rounded_free_to_learn(checkpoint, calibration, tmp_path):
    rounded = applied(
        Quantize(weights="int4", block_size=16, overrides={"layers.0.*": "float"}),
        checkpoint,
        calibration,
        tmp_path / "rounded",
    )
    step = Lora(rank=2, merge=False, initialization="loftq", learning_rate=0.02, **SHORT)
    after = applied(step, rounded, calibration, tmp_path / "after", floating=checkpoint)
    assert all(update.weight.any() for update in adapters.read(after.directory, "default").values())


@pytest.mark.parametrize(
    ("values", "key"),
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
def test_values_outside_their_range_are_refused_by_name(values, key):
    with pytest.raises(ConfigError) as error:
        Lora(**values)
    assert error.value.location == key


def test_a_rank_above_the_smallest_matrix_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="exceeds the smallest matrix side 32"):
        Lora(rank=48).plan(checkpoint.spec)


class TestOrders:
    def test_merging_into_rounded_weights_is_refused_and_an_adapter_beside_them_named(self, checkpoint):
        with pytest.raises(ConfigError, match=r"already rounded.*merge=false"):
            Lora().plan(Quantize().plan(checkpoint.spec))

    def test_an_adapter_beside_the_weights_may_follow_quantize_and_come_before_kv_cache(self, checkpoint):
        spec = KvCache().plan(Lora(rank=4, merge=False, name="tests").plan(Quantize().plan(checkpoint.spec)))
        assert spec.adapters == {"tests": Adapter(rank=4, targets=Lora().targets)}
        with pytest.raises(ConfigError, match="cannot follow kv_cache"):
            Lora(merge=False).plan(spec)

    def test_codes_may_not_be_trained_under_an_adapter(self, checkpoint):
        with pytest.raises(ConfigError, match="qat cannot follow lora with merge=false"):
            Qat().plan(Lora(merge=False).plan(Quantize().plan(checkpoint.spec)))

    def test_two_adapters_need_two_names(self, checkpoint):
        with pytest.raises(ConfigError, match="there is an adapter 'default' already"):
            Lora(merge=False).plan(Lora(merge=False).plan(checkpoint.spec))

    def test_loftq_needs_rounded_layers(self, checkpoint):
        with pytest.raises(ConfigError, match="the layers are not rounded"):
            Lora(merge=False, initialization="loftq").plan(checkpoint.spec)

    def test_fixed_ranges_of_inputs_do_not_know_the_adapter(self, checkpoint):
        with pytest.raises(ConfigError, match="taken without the adapter"):
            Lora(merge=False).plan(Int8(ranges="min_max").plan(checkpoint.spec))
