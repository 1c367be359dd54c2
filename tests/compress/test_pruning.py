"""Test importance scores and the pruning of channels, heads and layers."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stages import NoCache, compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import block_influence, calibration_windows, input_sum_of_squares
from edgeopt.compress.pruning.activation_energy import ActivationEnergy, output_energy
from edgeopt.compress.pruning.block_influence import BlockInfluence
from edgeopt.compress.pruning.importance import output_projection
from edgeopt.compress.pruning.prune_depth import PruneDepth
from edgeopt.compress.pruning.prune_heads import PruneHeads, block_row_indices, keep_key_value_groups
from edgeopt.compress.pruning.prune_width import PruneWidth, top_indices
from edgeopt.compress.pruning.taylor import Taylor
from edgeopt.compress.pruning.wanda import Wanda, weight_importance
from edgeopt.compress.pruning.width_allocation import (
    PRUNED_SHARES,
    allocate_widths_by_sensitivity,
    allocate_widths_globally,
    measure_sensitivities,
)
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.config_objects import canonical_json
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


def test_input_sum_of_squares_covers_all_tokens(network):
    inputs = []
    handle = modeling.layers(network)[1].mlp.down_proj.register_forward_pre_hook(lambda _, i: inputs.append(i[0]))
    energies = input_sum_of_squares(network, WINDOWS, lambda layer: layer.mlp.down_proj)
    handle.remove()
    expected = sum((x[0].double() ** 2).sum(dim=0) for x in inputs)
    torch.testing.assert_close(energies[1], expected)


def test_output_energy_matches_single_channel_output():
    x, down = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = [(x[:, c : c + 1] @ down[:, c : c + 1].T).square().sum() for c in range(6)]
    torch.testing.assert_close(output_energy(x.square().sum(dim=0), down), torch.stack(expected))


def test_weight_importance_is_norm_of_contribution():
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = (x[:, None, :] * weight).pow(2).sum(dim=0).sqrt()
    torch.testing.assert_close(weight_importance(weight, x.square().sum(dim=0)), expected)


@pytest.mark.parametrize("structure", ["mlp", "attention"])
def test_taylor_score_matches_finite_differences(structure, network):
    """The output of each channel is scaled by 1 - ε and 1 + ε."""
    network, epsilon = network.double(), 0.3  # norms compute in float32, so a small step would be lost in rounding

    def loss(window: list[int]) -> float:
        logits = network(torch.tensor([window])).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:])))

    scores = Taylor().score(network, WINDOWS, structure)
    weight = output_projection(modeling.layers(network)[1], structure).weight
    for channel in (0, 17, 42):
        slopes = []
        for window in WINDOWS:
            losses = []
            for scale in (1 - epsilon, 1 + epsilon):
                original = weight[:, channel].clone()
                weight[:, channel] *= scale
                losses.append(loss(window))
                weight[:, channel] = original
            slopes.append(abs(losses[1] - losses[0]) / (2 * epsilon))
        assert float(scores[1][channel]) == pytest.approx(sum(slopes) / len(slopes), rel=2e-2)


def test_taylor_layer_score_sums_channel_scores(network):
    channel_scores = [Taylor().score(network, WINDOWS, structure) for structure in ("mlp", "attention")]
    expected = [mlp.sum() + attention.sum() for mlp, attention in zip(*channel_scores, strict=True)]
    torch.testing.assert_close(Taylor().score(network, WINDOWS, "layer"), expected)


@pytest.mark.parametrize("importance", [ActivationEnergy(), Taylor(), Wanda(), BlockInfluence()])
def test_scoring_does_not_change_network(importance, network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for structure in importance.STRUCTURES:
        assert len(importance.score(network, WINDOWS, structure)) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("importance", [ActivationEnergy(), Taylor(), Wanda()])
@pytest.mark.parametrize("structure", ["mlp", "attention"])
def test_zero_channel_has_lowest_score(importance, structure, network):
    output_projection(modeling.layers(network)[1], structure).weight[:, 7] = 0.0
    scores = importance.score(network, WINDOWS, structure)
    assert scores[1][7] == 0.0 == scores[1].min()
    assert scores[1].shape == (output_projection(modeling.layers(network)[1], structure).in_features,)


def test_unsupported_structure_is_rejected():
    with pytest.raises(
        ConfigError,
        match=r"^importance: .*score the structure 'layer', got Wanda, which scores mlp and attention.*block_influence",
    ):
        PruneDepth(importance=Wanda())
    with pytest.raises(
        ConfigError,
        match=r"^importance: .*score the structure 'mlp', got BlockInfluence, which scores layer.*activation, taylor",
    ):
        PruneWidth(importance=BlockInfluence())
    with pytest.raises(ConfigError, match="score the structure 'attention', got BlockInfluence"):
        PruneHeads(importance=BlockInfluence())


def test_group_score_sums_query_head_channels(network):
    attention = modeling.layers(network)[0].self_attn
    channel_scores = torch.ones(64, dtype=torch.float64)
    channel_scores[40] = 2.0
    query, key = attention.q_proj.weight[32:].clone(), attention.k_proj.weight[16:].clone()
    keep_key_value_groups(attention, channel_scores, 1, 16)
    assert torch.equal(attention.q_proj.weight, query)
    assert torch.equal(attention.k_proj.weight, key)


def test_block_row_indices_cover_each_block():
    assert block_row_indices(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_identity_layer_has_zero_block_influence(network):
    layer = modeling.layers(network)[0]
    layer.mlp.down_proj.weight.zero_()
    layer.self_attn.o_proj.weight.zero_()
    assert block_influence(network, WINDOWS)[0] == pytest.approx(0.0, abs=1e-7)


def test_pruning_zero_channels_preserves_logits(network, checkpoint):
    zeroed = torch.arange(0, 128, 2)
    kept = torch.arange(1, 128, 2)
    for layer in modeling.layers(network):
        layer.mlp.down_proj.weight[:, zeroed] = 0.0
    before = network(torch.tensor(WINDOWS)).logits
    for layer in modeling.layers(network):
        modeling.keep_channels(layer.mlp, kept)
    torch.testing.assert_close(network(torch.tensor(WINDOWS)).logits, before)


def test_width_pruning_keeps_most_important_channels(checkpoint, calibration, tmp_path):
    step = PruneWidth(ratio=0.5, distribution="uniform", windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, compression_context(checkpoint, calibration))
    after = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    network = modeling.load(checkpoint)
    energies = input_sum_of_squares(
        network, calibration_windows(checkpoint, calibration, count=4, length=64), lambda layer: layer.mlp.down_proj
    )
    for old, new, energy in zip(modeling.layers(network), modeling.layers(after), energies, strict=True):
        scores = energy * old.mlp.down_proj.weight.double().pow(2).sum(0)
        kept = sorted(scores.argsort(descending=True)[:64].tolist())
        torch.testing.assert_close(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[kept])
        torch.testing.assert_close(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, kept])


def test_global_allocation_keeps_most_important_channels():
    uniform, skewed = torch.full((128,), 2.0), torch.cat([torch.full((40,), 5.0), torch.full((88,), 1.0)])
    assert allocate_widths_globally([uniform, skewed], total=160, multiple=32) == [128, 32]
    assert allocate_widths_globally([uniform, skewed], total=192, multiple=32) == [128, 64]


def test_layer_sensitivity_is_divergence_after_pruning(network):
    scores = ActivationEnergy().score(network, WINDOWS, "mlp")
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sensitivities = measure_sensitivities(network, scores, WINDOWS, lambda _: None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        before = network(torch.tensor(WINDOWS)).logits.double().log_softmax(-1)
        modeling.keep_channels(
            modeling.layers(network)[1].mlp, top_indices(scores[1], 128 - round(PRUNED_SHARES[2] * 128))
        )
        after = network(torch.tensor(WINDOWS)).logits.double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert sensitivities[1][2] == pytest.approx(float(expected), rel=1e-3)


divergence_curves = st.lists(
    st.lists(st.floats(0, 5), min_size=len(PRUNED_SHARES), max_size=len(PRUNED_SHARES)), min_size=1, max_size=3
)


@given(losses=divergence_curves, data=st.data())
@settings(max_examples=40)
def test_sensitivity_allocation_minimizes_total_divergence(losses, data):
    sizes = [data.draw(st.integers(32, 128)) for _ in losses]
    options = [range(32, size + 1, 32) for size in sizes]
    total = 32 * data.draw(st.integers(len(sizes), sum(map(len, options))))
    allocated = allocate_widths_by_sensitivity(losses, sizes, total, 32)

    def divergence(widths) -> float:
        return sum(
            np.interp(1 - width / size, (0, *PRUNED_SHARES), np.maximum.accumulate([0, *row]))
            for width, size, row in zip(widths, sizes, losses, strict=True)
        )

    assert sum(allocated) == total
    alternatives = [widths for widths in itertools.product(*options) if sum(widths) == total]
    assert divergence(allocated) == pytest.approx(min(map(divergence, alternatives)), abs=1e-5)


def test_sensitivity_allocation_uses_budget_at_zero_divergence():
    widths = allocate_widths_by_sensitivity([[0.0] * len(PRUNED_SHARES)] * 2, [128, 128], 192, 32)
    assert sum(widths) == 192


def test_sensitivities_are_cached_across_ratios(checkpoint, calibration, tmp_path):
    class MemoryCache(NoCache):
        def __init__(self) -> None:
            self.stages = {}

        def get_or_create(self, kind, inputs, produce):
            key = canonical_json([kind, inputs])
            if key not in self.stages:
                self.stages[key] = super().get_or_create(kind, inputs, produce)
            return self.stages[key]

    context = replace(compression_context(checkpoint, calibration), cache=MemoryCache())
    for ratio in (0.25, 0.5):
        (tmp_path / str(ratio)).mkdir()
        step = PruneWidth(ratio=ratio, distribution="sensitivity", windows=4, window_tokens=64)
        step.apply(checkpoint, tmp_path / str(ratio), context)
    assert len(context.cache.stages) == 1


def test_different_layer_widths_survive_save_and_load(checkpoint, tmp_path):
    network = modeling.load(checkpoint)
    modeling.keep_channels(modeling.layers(network)[0].mlp, torch.arange(32))
    before = network(torch.tensor(WINDOWS)).logits
    spec = modeling.spec_of(network, checkpoint.spec)
    modeling.save(network, tmp_path, checkpoint, spec)
    after = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    assert [layer.intermediate_size for layer in spec.layers] == [32, 128]
    torch.testing.assert_close(after(torch.tensor(WINDOWS)).logits, before)


def test_config_json_omits_source_directory(checkpoint, network, tmp_path):
    modeling.save(network, tmp_path, checkpoint, checkpoint.spec)
    assert str(checkpoint.directory) not in (tmp_path / "config.json").read_text()


def test_depth_pruning_removes_least_influential_layer(checkpoint, calibration, tmp_path):
    network = modeling.load(checkpoint)
    modeling.layers(network)[1].mlp.down_proj.weight.zero_()
    modeling.layers(network)[1].self_attn.o_proj.weight.zero_()
    (tmp_path / "in").mkdir()
    modeling.save(network, tmp_path / "in", checkpoint, checkpoint.spec)
    source = Checkpoint.seal(tmp_path / "in", format="checkpoint-1", spec=checkpoint.spec, made_by={})
    (tmp_path / "out").mkdir()
    spec = PruneDepth(layers=1, windows=4).apply(source, tmp_path / "out", compression_context(source, calibration))
    after = modeling.load(Checkpoint.seal(tmp_path / "out", format="checkpoint-1", spec=spec, made_by={}))
    torch.testing.assert_close(after(torch.tensor(WINDOWS)).logits, network(torch.tensor(WINDOWS)).logits)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_outside_range_is_rejected(ratio):
    for step in (PruneWidth, PruneHeads):
        with pytest.raises(ConfigError, match="must be"):
            step(ratio=ratio)


def test_ratio_removing_nothing_or_everything_is_rejected(checkpoint):
    with pytest.raises(ConfigError, match="must remove some but not all"):
        PruneWidth(ratio=0.05).plan(checkpoint.spec)
    with pytest.raises(ConfigError, match="must remove some but not all"):
        PruneHeads(ratio=0.9).plan(checkpoint.spec)
    with pytest.raises(ConfigError, match="must be less than the model's 2 layers, got 2"):
        PruneDepth(layers=2).plan(checkpoint.spec)


def test_head_pruning_keeps_query_group_size(checkpoint):
    after = PruneHeads(ratio=0.5).plan(checkpoint.spec)
    assert {(layer.heads, layer.kv_heads) for layer in after.layers} == {(2, 1)}
    assert replace(after, layers=checkpoint.spec.layers) == checkpoint.spec
