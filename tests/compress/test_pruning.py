"""Pruning keeps what matters, in all matrices alike, and computes exactly what the kept channels say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workshops import workshop

from edgeopt import network as networks
from edgeopt.artifact import Checkpoint
from edgeopt.compress.activations import block_influence, input_energy
from edgeopt.compress.prune_depth import PruneDepth
from edgeopt.compress.prune_heads import PruneHeads, expand, group_importance
from edgeopt.compress.prune_width import PruneWidth, channel_importance, global_widths
from edgeopt.errors import ConfigError
from edgeopt.intake import take_in
from edgeopt.text import Text

WINDOWS = [[1, 5, 9, 13, 17, 21], [2, 4, 8, 16, 32, 64]]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return take_in(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def network(checkpoint):
    return networks.load(checkpoint)


@pytest.fixture(scope="module")
def calibration() -> Text:
    return Text(name="calibration", documents=tuple(f"import module_{n}\nprint(module_{n})\n" * 8 for n in range(8)))


def test_input_energy_is_the_sum_of_squares_over_tokens(network):
    seen = []
    handle = networks.layers(network)[1].mlp.down_proj.register_forward_pre_hook(lambda _, i: seen.append(i[0]))
    energies = input_energy(network, WINDOWS, lambda layer: layer.mlp.down_proj)
    handle.remove()
    expected = sum((x[0].double() ** 2).sum(dim=0) for x in seen)
    torch.testing.assert_close(energies[1], expected)


def test_channel_importance_is_the_energy_of_the_channels_own_output():
    x, down = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    alone = [(x[:, c : c + 1] @ down[:, c : c + 1].T).square().sum() for c in range(6)]
    torch.testing.assert_close(channel_importance(x.square().sum(dim=0), down), torch.stack(alone))


def test_group_importance_adds_the_channels_of_a_groups_query_heads():
    energy, output = torch.rand(8, dtype=torch.float64), torch.randn(3, 8)
    channels = energy * output.double().pow(2).sum(0)
    torch.testing.assert_close(
        group_importance(energy, output, 2), torch.stack([channels[:4].sum(), channels[4:].sum()])
    )


def test_expand_names_the_rows_of_each_block():
    assert expand(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_block_influence_of_a_layer_that_adds_nothing_is_zero(network):
    layer = networks.layers(network)[0]
    layer.mlp.down_proj.weight.zero_()
    layer.self_attn.o_proj.weight.zero_()
    assert block_influence(network, WINDOWS)[0] == pytest.approx(0.0, abs=1e-7)


def test_removing_silent_channels_changes_no_logit(network, checkpoint):
    silent = torch.arange(0, 128, 2)
    kept = torch.arange(1, 128, 2)
    for layer in networks.layers(network):
        layer.mlp.down_proj.weight[:, silent] = 0.0
    before = network(torch.tensor(WINDOWS)).logits
    for layer in networks.layers(network):
        networks.keep_channels(layer.mlp, kept)
    torch.testing.assert_close(network(torch.tensor(WINDOWS)).logits, before)


def test_width_pruning_keeps_the_channels_of_largest_importance(checkpoint, calibration, tmp_path):
    step = PruneWidth(ratio=0.5, windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint, calibration))
    after = networks.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    network = networks.load(checkpoint)
    from edgeopt.compress.activations import calibration_windows

    energies = input_energy(
        network, calibration_windows(checkpoint, calibration, count=4, length=64), lambda layer: layer.mlp.down_proj
    )
    for old, new, energy in zip(networks.layers(network), networks.layers(after), energies, strict=True):
        score = energy * old.mlp.down_proj.weight.double().pow(2).sum(0)
        best = sorted(score.argsort(descending=True)[:64].tolist())
        torch.testing.assert_close(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[best])
        torch.testing.assert_close(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, best])


def test_a_global_budget_gives_more_to_layers_that_spread_their_energy():
    spread, peaked = torch.ones(128), torch.cat([torch.full((8,), 100.0), torch.full((120,), 1e-3)])
    widths = global_widths([spread, peaked], total=160, multiple=32)
    assert widths == [128, 32]


def test_layers_of_different_widths_survive_saving_and_loading(checkpoint, tmp_path):
    network = networks.load(checkpoint)
    networks.keep_channels(networks.layers(network)[0].mlp, torch.arange(32))
    before = network(torch.tensor(WINDOWS)).logits
    spec = networks.spec_of(network, checkpoint.spec)
    networks.save(network, tmp_path, checkpoint, spec)
    after = networks.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    assert [layer.intermediate_size for layer in spec.layers] == [32, 128]
    torch.testing.assert_close(after(torch.tensor(WINDOWS)).logits, before)


def test_depth_pruning_removes_the_layer_of_least_influence(checkpoint, calibration, tmp_path):
    network = networks.load(checkpoint)
    networks.layers(network)[1].mlp.down_proj.weight.zero_()
    networks.layers(network)[1].self_attn.o_proj.weight.zero_()
    (tmp_path / "idle").mkdir()
    networks.save(network, tmp_path / "idle", checkpoint, checkpoint.spec)
    idle = Checkpoint.seal(tmp_path / "idle", format="checkpoint-1", spec=checkpoint.spec, made_by={})
    (tmp_path / "out").mkdir()
    spec = PruneDepth(layers=1, windows=4).apply(idle, tmp_path / "out", workshop(idle, calibration))
    after = networks.load(Checkpoint.seal(tmp_path / "out", format="checkpoint-1", spec=spec, made_by={}))
    torch.testing.assert_close(after(torch.tensor(WINDOWS)).logits, network(torch.tensor(WINDOWS)).logits)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    for step in (PruneWidth, PruneHeads):
        with pytest.raises(ConfigError, match="outside its range"):
            step(ratio=ratio)


def test_a_ratio_that_leaves_nothing_or_everything_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="leaves"):
        PruneWidth(ratio=0.05).plan(checkpoint.spec)
    with pytest.raises(ConfigError, match="leaves"):
        PruneHeads(ratio=0.9).plan(checkpoint.spec)
    with pytest.raises(ConfigError, match="cannot be removed"):
        PruneDepth(layers=2).plan(checkpoint.spec)


def test_head_pruning_keeps_the_share_of_query_heads(checkpoint):
    after = PruneHeads(ratio=0.5).plan(checkpoint.spec)
    assert {(layer.heads, layer.kv_heads) for layer in after.layers} == {(2, 1)}
    assert replace(after, layers=checkpoint.spec.layers) == checkpoint.spec
