"""Test the training loop: batches, early stopping, divergence and resuming."""

import math

import pytest
import torch

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.recovery import training
from edgeopt.compress.recovery.training import Training, has_diverged, sample_batches, select_held_out
from edgeopt.errors import ConfigError, StepError

WINDOWS = [[n % 50 + 1, 7, 8, 9, n % 50 + 2, 11, 12] for n in range(40)]


@pytest.fixture
def network(tiny_model, tmp_path):
    (tmp_path / "in").mkdir()
    network = modeling.load(import_checkpoint(tiny_model, tmp_path / "in"))
    for layer in modeling.layers(network):
        layer.mlp.down_proj.weight.requires_grad_(True)
    return network


def short_training(**values) -> Training:
    return Training(**{"tokens": 200, "batch_tokens": 28, "window_tokens": 7, "held_out": 0.1, **values})


def test_next_token_loss_excludes_padding(network):
    windows = [[3, 1, 4, 1, 5], [9, 2, 6]]
    nll = []
    for window in windows:
        probabilities = network(torch.tensor([window])).logits[0].softmax(-1)
        nll += [-math.log(probabilities[t, window[t + 1]].item()) for t in range(len(window) - 1)]
    assert next_token_loss(windows)(network, [0, 1]).item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_batches_cover_all_windows_before_repeating():
    flat = [n for batch in sample_batches(range(10), steps=4, batch_size=5, seed=1) for n in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


def test_held_out_windows_are_never_trained_on(network):
    trained_windows: set[int] = set()

    def loss(module, batch):
        if module.training:
            trained_windows.update(batch)
        return next_token_loss(WINDOWS)(module, batch)

    short_training().fit(network, loss, len(WINDOWS), lambda _: None)
    assert trained_windows
    assert not trained_windows & set(select_held_out(len(WINDOWS), 0.1, 0))


def test_single_window_is_not_held_out():
    assert select_held_out(1, 0.5, 0) == []
    assert len(select_held_out(40, 0.05, 0)) == 2


def test_training_lowers_the_loss(network):
    losses = short_training(tokens=1400, learning_rate=0.01).fit(
        network, next_token_loss(WINDOWS), len(WINDOWS), lambda _: None
    )
    assert losses["held_out"][-1] < losses["train"][0]


def test_early_stopping_restores_best_weights(network):
    held_out_losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    states = []

    def loss(module, batch):
        if module.training:
            return next_token_loss(WINDOWS)(module, batch)
        states.append(modeling.layers(module)[0].mlp.down_proj.weight.detach().clone())
        return torch.tensor(next(held_out_losses))

    losses = short_training(tokens=28 * 20, patience=3, held_out=0.05).fit(network, loss, len(WINDOWS), lambda _: None)
    assert losses["held_out"] == pytest.approx([3.0, 2.0, 2.5, 2.6, 2.7])
    assert len(losses["train"]) == 10, "the fifth check, at step 10, is the third one without improvement"
    assert torch.equal(modeling.layers(network)[0].mlp.down_proj.weight, states[1])


def test_resumed_training_gives_same_weights(network, tiny_model, tmp_path):
    draft, folder = tmp_path / "draft", tmp_path / "resumed"
    draft.mkdir()
    folder.mkdir()
    uninterrupted = short_training(tokens=28 * 20).fit(network, next_token_loss(WINDOWS), len(WINDOWS), lambda _: None)
    resumed = modeling.load(import_checkpoint(tiny_model, folder))
    for layer in modeling.layers(resumed):
        layer.mlp.down_proj.weight.requires_grad_(True)
    steps = 0

    def interrupted_loss(module, batch):
        nonlocal steps
        steps += module.training
        if steps == 10:
            raise KeyboardInterrupt
        return next_token_loss(WINDOWS)(module, batch)

    with pytest.raises(KeyboardInterrupt):
        short_training(tokens=28 * 20).fit(resumed, interrupted_loss, len(WINDOWS), lambda _: None, draft)
    losses = short_training(tokens=28 * 20).fit(resumed, next_token_loss(WINDOWS), len(WINDOWS), lambda _: None, draft)
    assert losses == uninterrupted
    for resumed_layer, layer in zip(modeling.layers(resumed), modeling.layers(network), strict=True):
        assert torch.equal(resumed_layer.mlp.down_proj.weight, layer.mlp.down_proj.weight)


def test_nan_loss_stops_training(network):
    with pytest.raises(StepError, match=r"at step 1.*smaller learning rate"):
        short_training().fit(
            network, lambda *_: torch.tensor(math.nan, requires_grad=True), len(WINDOWS), lambda _: None
        )


@pytest.mark.parametrize("losses", [[3.0, 7.0], [3.0, math.nan], [3.0, math.inf], [math.nan]])
def test_exploding_or_nan_loss_is_divergence(losses):
    assert has_diverged(losses)


def test_falling_or_noisy_loss_is_not_divergence():
    assert not has_diverged([3.0, 2.0])
    assert not has_diverged([3.0, 3.3])
    assert not has_diverged([0.001, 0.01])


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"tokens": 0}, "tokens"),
        ({"patience": 0}, "patience"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"held_out": 1.0}, "held_out"),
    ],
)
def test_invalid_values_are_rejected(values, location):
    with pytest.raises(ConfigError, match="must be") as error:
        Training(**values)
    assert error.value.location == location


def test_training_device_is_cuda_when_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training.training_device().type == "cuda"
