"""A student is its teacher without the channels that were left out, in every matrix, table and norm."""

import json

import pytest
import torch
from support import specs
from support.workshops import workshop

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import norm_sum_of_squares
from edgeopt.compress.pruning.block_influence import BlockInfluence
from edgeopt.compress.pruning.sparsify import Sparsify
from edgeopt.compress.pruning.student import Student, evenly, keep_hidden
from edgeopt.compress.recovery.distill import Distill
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError

WINDOWS = [[1, 5, 9, 13, 17, 21], [2, 4, 8, 16, 32, 64]]


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def network(checkpoint):
    return modeling.load(checkpoint)


def made(checkpoint: Checkpoint, directory, **values) -> Checkpoint:
    spec = Student(**{"windows": 4, "window_tokens": 64, **values}).apply(checkpoint, directory, workshop(checkpoint))
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(4, 4, [0, 1, 2, 3]), (4, 2, [0, 3]), (30, 4, [0, 10, 19, 29]), (5, 1, [4]), (1, 1, [0])],
)
def test_layers_are_taken_evenly_with_the_first_and_the_last(count, wanted, expected):
    assert evenly(count, wanted) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_removing_silent_hidden_channels_changes_no_logit(tied, network):
    """A norm divides by the mean square, of which silent channels are a part: that alone is made up for."""
    if not tied:
        modeling.untie(network)
        network.get_output_embeddings().weight[:, :40] += 0.1
    network.get_input_embeddings().weight *= 50  # far above the norms' epsilon, which the cut scales too
    silent, kept = torch.arange(0, 64, 4), torch.tensor([n for n in range(64) if n % 4])
    network.get_input_embeddings().weight[:, silent] = 0.0
    for layer in modeling.layers(network):
        layer.self_attn.o_proj.weight[silent] = 0.0
        layer.mlp.down_proj.weight[silent] = 0.0
    before = network(torch.tensor(WINDOWS)).logits
    keep_hidden(network, kept)
    for norm in modeling.norms(network):
        norm.weight *= (64 / 48) ** 0.5
    after = network(torch.tensor(WINDOWS)).logits
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_the_energy_of_a_channel_is_that_behind_all_norms(network):
    seen = []
    handles = [
        norm.register_forward_hook(lambda _, __, output: seen.append(output)) for norm in modeling.norms(network)
    ]
    found = norm_sum_of_squares(network, WINDOWS)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(WINDOWS) * 5, "two norms in each of two layers, and the last"
    torch.testing.assert_close(found, sum(x.double().square().sum(dim=(0, 1)) for x in seen))


def test_what_is_kept_are_rows_and_columns_of_the_teacher(checkpoint, network, tmp_path):
    after = made(checkpoint, tmp_path, layers=1, hidden_size=48)
    report = json.loads((tmp_path / "artifacts" / "student.json").read_text())
    hidden, student = report["kept_hidden_channels"], modeling.load(after)
    assert report["kept_layers"] == [1]
    assert len(set(hidden)) == 48
    assert hidden == sorted(hidden)
    teacher, layer = modeling.layers(network)[1], modeling.layers(student)[0]
    assert torch.equal(layer.self_attn.q_proj.weight, teacher.self_attn.q_proj.weight[:, hidden])
    assert torch.equal(layer.mlp.down_proj.weight, teacher.mlp.down_proj.weight[hidden])
    assert torch.equal(layer.input_layernorm.weight, teacher.input_layernorm.weight[hidden])
    assert torch.equal(student.get_input_embeddings().weight, network.get_input_embeddings().weight[:, hidden])


def test_the_checkpoint_tells_its_new_sizes(checkpoint, tmp_path):
    after = made(checkpoint, tmp_path, layers=1, hidden_size=48, intermediate_size=96, kv_heads=1)
    assert after.spec == specs.llama(hidden=48, intermediate=96, heads=2, kv_heads=1, layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (48, 16, 2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, r"hidden_size: the student is as large as its teacher"),
        ({"layers": 3}, r"layers: 3 is more than the teacher's 2"),
        ({"hidden_size": 50}, r"hidden_size: 50 is no multiple of the 4 query heads.*Give 48"),
        ({"intermediate_size": 256}, r"intermediate_size: 256 is more"),
        ({"kv_heads": 4}, r"kv_heads: 4 is more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        Student(**values).plan(specs.llama())


def test_values_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match="layers: 0 is outside its range"):
        Student(layers=0)
    with pytest.raises(ConfigError, match="BlockInfluence scores layer"):
        Student(importance=BlockInfluence())
    with pytest.raises(ConfigError, match="cannot follow sparsify"):
        Student(layers=1).plan(Sparsify().plan(specs.llama()))


def test_hidden_states_of_another_size_are_not_compared(checkpoint, tmp_path):
    (tmp_path / "student").mkdir(), (tmp_path / "out").mkdir()
    student = made(checkpoint, tmp_path / "student", hidden_size=48)
    step = Distill(tokens=64, batch_tokens=64, window_tokens=64, hidden_weight=0.5)
    with pytest.raises(ConfigError, match=r"hidden_weight: the teacher has 64 hidden channels and the model 48"):
        step.apply(student, tmp_path / "out", workshop(checkpoint))
