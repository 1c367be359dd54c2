"""Test that a student consists of the selected layers and channels of its teacher."""

import json

import pytest
import torch
from support import specs
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import norm_sum_of_squares
from edgeopt.compress.pruning.block_influence import BlockInfluence
from edgeopt.compress.pruning.sparsify import Sparsify
from edgeopt.compress.pruning.student import Student, evenly_spaced_indices, keep_hidden_channels
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


def make_student(checkpoint: Checkpoint, directory, **values) -> Checkpoint:
    spec = Student(**{"windows": 4, "window_tokens": 64, **values}).apply(
        checkpoint, directory, compression_context(checkpoint)
    )
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(4, 4, [0, 1, 2, 3]), (4, 2, [0, 3]), (30, 4, [0, 10, 19, 29]), (5, 1, [4]), (1, 1, [0])],
)
def test_evenly_spaced_indices_include_both_ends(length, count, expected):
    assert evenly_spaced_indices(length, count) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_pruning_zero_hidden_channels_preserves_logits(tied, network):
    """Rescale the norm weights: norms divide by the root mean square over all channels, and pruning removes some."""
    if not tied:
        modeling.untie(network)
        network.get_output_embeddings().weight[:, :40] += 0.1
    network.get_input_embeddings().weight *= 50  # far above the epsilon of the norms, which pruning rescales too
    zeroed, kept = torch.arange(0, 64, 4), torch.tensor([n for n in range(64) if n % 4])
    network.get_input_embeddings().weight[:, zeroed] = 0.0
    for layer in modeling.layers(network):
        layer.self_attn.o_proj.weight[zeroed] = 0.0
        layer.mlp.down_proj.weight[zeroed] = 0.0
    before = network(torch.tensor(WINDOWS)).logits
    keep_hidden_channels(network, kept)
    for norm in modeling.norms(network):
        norm.weight *= (64 / 48) ** 0.5
    after = network(torch.tensor(WINDOWS)).logits
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_norm_sum_of_squares_covers_all_norms(network):
    outputs = []
    handles = [
        norm.register_forward_hook(lambda _, __, output: outputs.append(output)) for norm in modeling.norms(network)
    ]
    energy = norm_sum_of_squares(network, WINDOWS)
    for handle in handles:
        handle.remove()
    assert len(outputs) == len(WINDOWS) * 5, "two norms in each of two layers, and the final norm"
    torch.testing.assert_close(energy, sum(x.double().square().sum(dim=(0, 1)) for x in outputs))


def test_student_weights_are_teacher_rows_and_columns(checkpoint, network, tmp_path):
    after = make_student(checkpoint, tmp_path, layers=1, hidden_size=48)
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


def test_student_checkpoint_records_new_sizes(checkpoint, tmp_path):
    after = make_student(checkpoint, tmp_path, layers=1, hidden_size=48, intermediate_size=96, kv_heads=1)
    assert after.spec == specs.llama(hidden=48, intermediate=96, heads=2, kv_heads=1, layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (48, 16, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"hidden_size: The student must be smaller than its teacher"),
        ({"layers": 3}, r"layers: `layers` must be at most the teacher's 2, got 3"),
        ({"hidden_size": 50}, r"hidden_size: .*must be a multiple of the 4 query heads, got 50.*Use 48"),
        ({"intermediate_size": 256}, r"intermediate_size: .*at most the teacher's 128, got 256"),
        ({"kv_heads": 4}, r"kv_heads: .*at most the teacher's 2, got 4"),
    ],
)
def test_invalid_sizes_are_rejected(values, message):
    with pytest.raises(ConfigError, match=message):
        Student(**values).plan(specs.llama())


def test_invalid_values_are_rejected():
    with pytest.raises(ConfigError, match="layers: `layers` must be at least 1, got 0"):
        Student(layers=0)
    with pytest.raises(ConfigError, match="got BlockInfluence, which scores layer"):
        Student(importance=BlockInfluence())
    with pytest.raises(ConfigError, match="cannot follow sparsify"):
        Student(layers=1).plan(Sparsify().plan(specs.llama()))


def test_hidden_loss_requires_equal_hidden_size(checkpoint, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "out").mkdir()
    student = make_student(checkpoint, tmp_path / "student", hidden_size=48)
    step = Distill(tokens=64, batch_tokens=64, window_tokens=64, hidden_weight=0.5)
    with pytest.raises(ConfigError, match=r"hidden_weight: .*64 channels in the teacher and 48 in the model"):
        step.apply(student, tmp_path / "out", compression_context(checkpoint))
