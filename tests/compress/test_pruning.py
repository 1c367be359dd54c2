"""Pruning keeps what matters, in all matrices alike, and computes exactly what the kept channels say."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.workshops import NoCache, workshop

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import block_influence, calibration_windows, input_sum_of_squares
from edgeopt.compress.pruning.activation_energy import ActivationEnergy, output_energy
from edgeopt.compress.pruning.block_influence import BlockInfluence
from edgeopt.compress.pruning.importance import output
from edgeopt.compress.pruning.prune_depth import PruneDepth
from edgeopt.compress.pruning.prune_heads import PruneHeads, expand, keep_groups
from edgeopt.compress.pruning.prune_width import PruneWidth, most_important
from edgeopt.compress.pruning.taylor import Taylor
from edgeopt.compress.pruning.wanda import Wanda, weight_importance
from edgeopt.compress.pruning.widths import SHARES, global_widths, least_divergent_widths, sensitivities
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.config_objects import canonical
from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError

WINDOWS = [[1, 5, 9, 13, 17, 21], [2, 4, 8, 16, 32, 64]]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def network(checkpoint):
    return modeling.load(checkpoint)


@pytest.fixture(scope="module")
def calibration() -> Text:
    return Text(name="calibration", documents=tuple(f"import module_{n}\nprint(module_{n})\n" * 8 for n in range(8)))


def test_input_energy_is_the_sum_of_squares_over_tokens(network):
    seen = []
    handle = modeling.layers(network)[1].mlp.down_proj.register_forward_pre_hook(lambda _, i: seen.append(i[0]))
    energies = input_sum_of_squares(network, WINDOWS, lambda layer: layer.mlp.down_proj)
    handle.remove()
    expected = sum((x[0].double() ** 2).sum(dim=0) for x in seen)
    torch.testing.assert_close(energies[1], expected)


def test_activation_energy_is_the_energy_of_the_channels_own_output():
    x, down = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    alone = [(x[:, c : c + 1] @ down[:, c : c + 1].T).square().sum() for c in range(6)]
    torch.testing.assert_close(output_energy(x.square().sum(dim=0), down), torch.stack(alone))


def test_a_weight_is_as_important_as_the_norm_of_what_it_adds_to_the_output():
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    added = (x[:, None, :] * weight).pow(2).sum(dim=0).sqrt()
    torch.testing.assert_close(weight_importance(weight, x.square().sum(dim=0)), added)


@pytest.mark.parametrize("structure", ["mlp", "attention"])
def test_taylor_is_the_slope_of_the_loss_along_the_channel(structure, network):
    """Against finite differences: each channel's output is scaled by 1 - ε and 1 + ε."""
    network, step = network.double(), 0.3

    def loss(window: list[int]) -> float:
        logits = network(torch.tensor([window])).logits[0, :-1]  # norms compute in float32: a wide step
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:])))

    found = Taylor().scores(network, WINDOWS, structure)
    weight = output(modeling.layers(network)[1], structure).weight
    for channel in (0, 17, 42):
        slopes = []
        for window in WINDOWS:
            ends = []
            for scale in (1 - step, 1 + step):
                kept = weight[:, channel].clone()
                weight[:, channel] *= scale
                ends.append(loss(window))
                weight[:, channel] = kept
            slopes.append(abs(ends[1] - ends[0]) / (2 * step))
        assert float(found[1][channel]) == pytest.approx(sum(slopes) / len(slopes), rel=2e-2)


def test_taylor_scores_a_layer_as_the_sum_of_its_channels(network):
    parts = [Taylor().scores(network, WINDOWS, part) for part in ("mlp", "attention")]
    expected = [mlp.sum() + attention.sum() for mlp, attention in zip(*parts, strict=True)]
    torch.testing.assert_close(Taylor().scores(network, WINDOWS, "layer"), expected)


@pytest.mark.parametrize("importance", [ActivationEnergy(), Taylor(), Wanda(), BlockInfluence()])
def test_scoring_leaves_the_network_as_it_was(importance, network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for structure in importance.STRUCTURES:
        assert len(importance.scores(network, WINDOWS, structure)) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("importance", [ActivationEnergy(), Taylor(), Wanda()])
@pytest.mark.parametrize("structure", ["mlp", "attention"])
def test_a_channel_that_adds_nothing_matters_least(importance, structure, network):
    output(modeling.layers(network)[1], structure).weight[:, 7] = 0.0
    scores = importance.scores(network, WINDOWS, structure)
    assert scores[1][7] == 0.0 == scores[1].min()
    assert scores[1].shape == (output(modeling.layers(network)[1], structure).in_features,)


def test_a_score_that_means_nothing_for_a_structure_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"importance: Wanda scores mlp and attention, and no layer.*block_influence"):
        PruneDepth(importance=Wanda())
    with pytest.raises(ConfigError, match=r"importance: BlockInfluence scores layer, and no mlp.*activation, taylor"):
        PruneWidth(importance=BlockInfluence())
    with pytest.raises(ConfigError, match="no attention"):
        PruneHeads(importance=BlockInfluence())


def test_a_group_is_worth_the_channels_of_its_query_heads(network):
    attention = modeling.layers(network)[0].self_attn
    score = torch.ones(64, dtype=torch.float64)
    score[40] = 2.0
    query, key = attention.q_proj.weight[32:].clone(), attention.k_proj.weight[16:].clone()
    keep_groups(attention, score, 1, 16)
    assert torch.equal(attention.q_proj.weight, query)
    assert torch.equal(attention.k_proj.weight, key)


def test_expand_names_the_rows_of_each_block():
    assert expand(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_block_influence_of_a_layer_that_adds_nothing_is_zero(network):
    layer = modeling.layers(network)[0]
    layer.mlp.down_proj.weight.zero_()
    layer.self_attn.o_proj.weight.zero_()
    assert block_influence(network, WINDOWS)[0] == pytest.approx(0.0, abs=1e-7)


def test_removing_silent_channels_changes_no_logit(network, checkpoint):
    silent = torch.arange(0, 128, 2)
    kept = torch.arange(1, 128, 2)
    for layer in modeling.layers(network):
        layer.mlp.down_proj.weight[:, silent] = 0.0
    before = network(torch.tensor(WINDOWS)).logits
    for layer in modeling.layers(network):
        modeling.keep_channels(layer.mlp, kept)
    torch.testing.assert_close(network(torch.tensor(WINDOWS)).logits, before)


def test_width_pruning_keeps_the_channels_of_largest_importance(checkpoint, calibration, tmp_path):
    step = PruneWidth(ratio=0.5, distribution="uniform", windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint, calibration))
    after = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    network = modeling.load(checkpoint)
    energies = input_sum_of_squares(
        network, calibration_windows(checkpoint, calibration, count=4, length=64), lambda layer: layer.mlp.down_proj
    )
    for old, new, energy in zip(modeling.layers(network), modeling.layers(after), energies, strict=True):
        score = energy * old.mlp.down_proj.weight.double().pow(2).sum(0)
        best = sorted(score.argsort(descending=True)[:64].tolist())
        torch.testing.assert_close(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[best])
        torch.testing.assert_close(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, best])


def test_a_global_budget_keeps_the_most_important_channels_of_all_layers():
    strong, weak = torch.full((128,), 2.0), torch.cat([torch.full((40,), 5.0), torch.full((88,), 1.0)])
    assert global_widths([strong, weak], total=160, multiple=32) == [128, 32]
    assert global_widths([strong, weak], total=192, multiple=32) == [128, 64]


def test_the_sensitivity_of_a_layer_is_the_divergence_after_its_cut(network):
    scores = ActivationEnergy().scores(network, WINDOWS, "mlp")
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = sensitivities(network, scores, WINDOWS, lambda _: None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        before = network(torch.tensor(WINDOWS)).logits.double().log_softmax(-1)
        modeling.keep_channels(modeling.layers(network)[1].mlp, most_important(scores[1], 128 - round(SHARES[2] * 128)))
        after = network(torch.tensor(WINDOWS)).logits.double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert found[1][2] == pytest.approx(float(expected), rel=1e-3)


curves = st.lists(st.lists(st.floats(0, 5), min_size=len(SHARES), max_size=len(SHARES)), min_size=1, max_size=3)


@given(losses=curves, data=st.data())
@settings(max_examples=40)
def test_the_whole_budget_is_used_and_no_other_widths_diverge_less(losses, data):
    sizes = [data.draw(st.integers(32, 128)) for _ in losses]
    offered = [range(32, size + 1, 32) for size in sizes]
    total = 32 * data.draw(st.integers(len(sizes), sum(map(len, offered))))
    found = least_divergent_widths(losses, sizes, total, 32)

    def lost(widths) -> float:
        return sum(
            np.interp(1 - width / size, (0, *SHARES), np.maximum.accumulate([0, *row]))
            for width, size, row in zip(widths, sizes, losses, strict=True)
        )

    assert sum(found) == total
    full = [widths for widths in itertools.product(*offered) if sum(widths) == total]
    assert lost(found) == pytest.approx(min(map(lost, full)), abs=1e-5)


def test_the_whole_budget_is_used_where_nothing_is_lost():
    found = least_divergent_widths([[0.0] * len(SHARES)] * 2, [128, 128], 192, 32)
    assert sum(found) == 192


def test_sensitivities_are_measured_once_for_all_ratios(checkpoint, calibration, tmp_path):
    class Counting(NoCache):
        def __init__(self) -> None:
            self.kept = {}

        def stage(self, kind, inputs, produce):
            key = canonical([kind, inputs])
            if key not in self.kept:
                self.kept[key] = super().stage(kind, inputs, produce)
            return self.kept[key]

    context = replace(workshop(checkpoint, calibration), cache=Counting())
    for ratio in (0.25, 0.5):
        (tmp_path / str(ratio)).mkdir()
        step = PruneWidth(ratio=ratio, distribution="sensitivity", windows=4, window_tokens=64)
        step.apply(checkpoint, tmp_path / str(ratio), context)
    assert len(context.cache.kept) == 1


def test_layers_of_different_widths_survive_saving_and_loading(checkpoint, tmp_path):
    network = modeling.load(checkpoint)
    modeling.keep_channels(modeling.layers(network)[0].mlp, torch.arange(32))
    before = network(torch.tensor(WINDOWS)).logits
    spec = modeling.spec_of(network, checkpoint.spec)
    modeling.save(network, tmp_path, checkpoint, spec)
    after = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    assert [layer.intermediate_size for layer in spec.layers] == [32, 128]
    torch.testing.assert_close(after(torch.tensor(WINDOWS)).logits, before)


def test_config_json_says_nothing_of_where_the_input_lay(checkpoint, network, tmp_path):
    modeling.save(network, tmp_path, checkpoint, checkpoint.spec)
    assert str(checkpoint.directory) not in (tmp_path / "config.json").read_text()


def test_depth_pruning_removes_the_layer_of_least_influence(checkpoint, calibration, tmp_path):
    network = modeling.load(checkpoint)
    modeling.layers(network)[1].mlp.down_proj.weight.zero_()
    modeling.layers(network)[1].self_attn.o_proj.weight.zero_()
    (tmp_path / "idle").mkdir()
    modeling.save(network, tmp_path / "idle", checkpoint, checkpoint.spec)
    idle = Checkpoint.seal(tmp_path / "idle", format="checkpoint-1", spec=checkpoint.spec, made_by={})
    (tmp_path / "out").mkdir()
    spec = PruneDepth(layers=1, windows=4).apply(idle, tmp_path / "out", workshop(idle, calibration))
    after = modeling.load(Checkpoint.seal(tmp_path / "out", format="checkpoint-1", spec=spec, made_by={}))
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
