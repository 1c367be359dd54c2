"""LoRA trains what it says, wins back quality, and merges exactly."""

import math
from pathlib import Path

import pytest
import torch

from edgeopt import network as networks
from edgeopt.artifact import Checkpoint
from edgeopt.compress.lora import Lora, batch_loss, batches, diverged, train
from edgeopt.errors import ConfigError, StepError
from edgeopt.intake import take_in
from edgeopt.text import Text


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return take_in(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def calibration() -> Text:
    return Text(name="calibration", documents=tuple("for item in items:\n    print(item)\n" * 8 for _ in range(6)))


def test_loss_is_the_mean_negative_log_likelihood_without_padding(checkpoint):
    network = networks.load(checkpoint)
    batch = [[3, 1, 4, 1, 5], [9, 2, 6]]
    nll = []
    for window in batch:
        probabilities = network(torch.tensor([window])).logits[0].softmax(-1)
        nll += [-math.log(probabilities[t, window[t + 1]].item()) for t in range(len(window) - 1)]
    assert batch_loss(network, batch, torch.device("cpu")).item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_batches_pass_over_all_windows_before_they_repeat_one():
    windows = [[n] for n in range(10)]
    flat = [w[0] for batch in batches(windows, steps=4, size=5, seed=1) for w in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


def test_training_lowers_the_loss_and_the_merged_weights_keep_it(checkpoint, calibration, tmp_path):
    step = Lora(rank=8, steps=30, learning_rate=0.02, batch_tokens=256, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, calibration, lambda _: None)
    after = Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={})
    from edgeopt.compress.activations import calibration_windows

    windows = calibration_windows(checkpoint, calibration, count=8, length=64)
    before, now = (batch_loss(networks.load(c), windows, torch.device("cpu")).item() for c in (checkpoint, after))
    assert now < before - 0.5


def test_the_adapter_is_kept_and_equals_the_merged_weights(checkpoint, calibration, tmp_path):
    from peft import PeftModel

    step = Lora(rank=4, steps=3, batch_tokens=128, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, calibration, lambda _: None)
    merged = networks.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    adapted = PeftModel.from_pretrained(networks.load(checkpoint), tmp_path / "artifacts" / "adapter")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "artifacts" / "adapter").glob("*.bin"))


@pytest.mark.parametrize("losses", [[3.0, 7.0], [3.0, math.nan], [3.0, math.inf], [math.nan]])
def test_a_loss_that_explodes_or_is_no_number_is_divergence(losses):
    assert diverged(losses)


def test_a_loss_that_falls_or_wavers_is_none():
    assert not diverged([3.0, 2.0])
    assert not diverged([3.0, 3.3])


def test_divergence_is_an_error_that_names_the_learning_rate(checkpoint, calibration, tmp_path):
    network = networks.load(checkpoint)
    for parameter in network.parameters():
        parameter.fill_(float("nan"))
    (tmp_path / "broken").mkdir()
    networks.save(network, tmp_path / "broken", checkpoint, checkpoint.spec)
    broken = Checkpoint.seal(tmp_path / "broken", format="checkpoint-1", spec=checkpoint.spec, made_by={})
    (tmp_path / "out").mkdir()
    with pytest.raises(StepError, match="smaller learning rate"):
        Lora(rank=4, steps=2, batch_tokens=128, window_tokens=64).apply(
            broken, tmp_path / "out", calibration, lambda _: None
        )


def test_training_stops_at_the_first_loss_that_is_no_number(checkpoint):
    network = networks.load(checkpoint)
    for parameter in network.parameters():
        parameter.fill_(float("nan"))
        parameter.requires_grad_(True)
    losses = train(network, [[[1, 2, 3]]] * 5, steps=5, learning_rate=1e-3, progress=lambda _: None)
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rank": 1}, "rank"),
        ({"rank": 65}, "rank"),
        ({"steps": 0}, "steps"),
        ({"alpha": 0.0}, "alpha"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"targets": ("nope",)}, "targets"),
        ({"targets": ()}, "targets"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(values, key):
    with pytest.raises(ConfigError) as error:
        Lora(**values)
    assert error.value.place == key


def test_a_rank_above_the_smallest_matrix_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="exceeds the smallest matrix side 32"):
        Lora(rank=48).plan(checkpoint.spec)
