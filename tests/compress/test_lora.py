"""LoRA trains what it says, wins back quality, and merges exactly."""

from pathlib import Path

import pytest
import torch
from workshops import workshop

from edgeopt import network as networks
from edgeopt.artifact import Checkpoint
from edgeopt.compress.lora import Lora
from edgeopt.compress.training import next_token_loss
from edgeopt.errors import ConfigError
from edgeopt.intake import take_in
from edgeopt.text import Text


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return take_in(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def calibration() -> Text:
    return Text(name="calibration", documents=tuple("for item in items:\n    print(item)\n" * 8 for _ in range(6)))


def test_training_lowers_the_loss_and_the_merged_weights_keep_it(checkpoint, calibration, tmp_path):
    step = Lora(rank=8, tokens=7680, learning_rate=0.02, batch_tokens=256, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint, calibration))
    after = Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={})
    from edgeopt.compress.activations import calibration_windows

    windows = calibration_windows(checkpoint, calibration, count=8, length=64)
    before, now = (next_token_loss(windows)(networks.load(c), range(len(windows))).item() for c in (checkpoint, after))
    assert now < before - 0.5


def test_the_adapter_is_kept_and_equals_the_merged_weights(checkpoint, calibration, tmp_path):
    from peft import PeftModel

    step = Lora(rank=4, tokens=384, batch_tokens=128, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint, calibration))
    merged = networks.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    adapted = PeftModel.from_pretrained(networks.load(checkpoint), tmp_path / "artifacts" / "adapter")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "artifacts" / "adapter").glob("*.bin"))


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
    ],
)
def test_values_outside_their_range_are_refused_by_name(values, key):
    with pytest.raises(ConfigError) as error:
        Lora(**values)
    assert error.value.place == key


def test_a_rank_above_the_smallest_matrix_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="exceeds the smallest matrix side 32"):
        Lora(rank=48).plan(checkpoint.spec)
