"""Training: its loss, its order, its stops, and that a killed one goes on as if nothing had happened."""

import math

import pytest
import torch

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.recovery import training
from edgeopt.compress.recovery.training import Training, batches, diverged, held_out
from edgeopt.errors import ConfigError, StepError

WINDOWS = [[n % 50 + 1, 7, 8, 9, n % 50 + 2, 11, 12] for n in range(40)]


@pytest.fixture
def network(tiny_model, tmp_path):
    (tmp_path / "in").mkdir()
    network = modeling.load(import_checkpoint(tiny_model, tmp_path / "in"))
    for layer in modeling.layers(network):
        layer.mlp.down_proj.weight.requires_grad_(True)
    return network


def short(**values) -> Training:
    return Training(**{"tokens": 200, "batch_tokens": 28, "window_tokens": 7, "held_out": 0.1, **values})


def test_the_loss_is_the_mean_negative_log_likelihood_without_padding(network):
    windows = [[3, 1, 4, 1, 5], [9, 2, 6]]
    nll = []
    for window in windows:
        probabilities = network(torch.tensor([window])).logits[0].softmax(-1)
        nll += [-math.log(probabilities[t, window[t + 1]].item()) for t in range(len(window) - 1)]
    assert next_token_loss(windows)(network, [0, 1]).item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_batches_pass_over_all_windows_before_they_repeat_one():
    flat = [n for batch in batches(range(10), steps=4, size=5, seed=1) for n in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


def test_windows_held_out_are_never_trained_on(network):
    seen: set[int] = set()

    def loss(trained, batch):
        if trained.training:
            seen.update(batch)
        return next_token_loss(WINDOWS)(trained, batch)

    short().fit(network, loss, len(WINDOWS), lambda _: None)
    assert seen
    assert not seen & set(held_out(len(WINDOWS), 0.1, 0))


def test_one_window_is_trained_on_in_place_of_being_held_out():
    assert held_out(1, 0.5, 0) == []
    assert len(held_out(40, 0.05, 0)) == 2


def test_training_lowers_the_loss(network):
    found = short(tokens=1400, learning_rate=0.01).fit(network, next_token_loss(WINDOWS), len(WINDOWS), lambda _: None)
    assert found["held_out"][-1] < found["train"][0]


def test_training_stops_when_held_out_loss_rises_and_returns_to_its_best(network):
    values = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    states = []

    def loss(trained, batch):
        if trained.training:
            return next_token_loss(WINDOWS)(trained, batch)
        states.append(modeling.layers(trained)[0].mlp.down_proj.weight.detach().clone())
        return torch.tensor(next(values))

    found = short(tokens=28 * 20, patience=3, held_out=0.05).fit(network, loss, len(WINDOWS), lambda _: None)
    assert found["held_out"] == pytest.approx([3.0, 2.0, 2.5, 2.6, 2.7])
    assert len(found["train"]) == 10, "a check every second step, and the fifth was the third without gain"
    assert torch.equal(modeling.layers(network)[0].mlp.down_proj.weight, states[1])


def test_a_killed_training_goes_on_and_ends_in_the_same_weights(network, tiny_model, tmp_path):
    draft, again = tmp_path / "draft", tmp_path / "again"
    draft.mkdir(), again.mkdir()
    whole = short(tokens=28 * 20).fit(network, next_token_loss(WINDOWS), len(WINDOWS), lambda _: None)
    second = modeling.load(import_checkpoint(tiny_model, again))
    for layer in modeling.layers(second):
        layer.mlp.down_proj.weight.requires_grad_(True)
    steps = 0

    def killing(trained, batch):
        nonlocal steps
        steps += trained.training
        if steps == 10:
            raise KeyboardInterrupt
        return next_token_loss(WINDOWS)(trained, batch)

    with pytest.raises(KeyboardInterrupt):
        short(tokens=28 * 20).fit(second, killing, len(WINDOWS), lambda _: None, draft)
    found = short(tokens=28 * 20).fit(second, next_token_loss(WINDOWS), len(WINDOWS), lambda _: None, draft)
    assert found == whole
    for mine, theirs in zip(modeling.layers(second), modeling.layers(network), strict=True):
        assert torch.equal(mine.mlp.down_proj.weight, theirs.mlp.down_proj.weight)


def test_the_first_loss_that_is_no_number_ends_training(network):
    with pytest.raises(StepError, match=r"in 1 steps.*smaller learning rate"):
        short().fit(network, lambda *_: torch.tensor(math.nan, requires_grad=True), len(WINDOWS), lambda _: None)


@pytest.mark.parametrize("losses", [[3.0, 7.0], [3.0, math.nan], [3.0, math.inf], [math.nan]])
def test_a_loss_that_explodes_or_is_no_number_is_divergence(losses):
    assert diverged(losses)


def test_a_loss_that_falls_or_wavers_is_none():
    assert not diverged([3.0, 2.0])
    assert not diverged([3.0, 3.3])
    assert not diverged([0.001, 0.01])


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"tokens": 0}, "tokens"),
        ({"patience": 0}, "patience"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"held_out": 1.0}, "held_out"),
    ],
)
def test_values_outside_their_range_are_refused(values, location):
    with pytest.raises(ConfigError, match="outside its range") as caught:
        Training(**values)
    assert caught.value.location == location


def test_networks_are_trained_on_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training.device().type == "cuda"
