"""Inputs in 8 bits: ranges by their formulas, and engines that stay near the model in float."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.quantization.activation_ranges import affine, bounds, entropy_limit
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.smooth_quant import SmoothQuant
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.runtime import Genai

TEXT = Text(name="text", documents=tuple(f"def f{n}(x):\n    return x + {n}\n" * 6 for n in range(8)))


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def outlying(checkpoint, tmp_path_factory) -> Checkpoint:
    """A model that computes the same, with one channel of each norm scaled up by 60 and its weights down."""
    directory = tmp_path_factory.mktemp("outlying")
    network = modeling.load(checkpoint)
    for layer in modeling.layers(network):
        readers = {
            layer.input_layernorm: (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            layer.post_attention_layernorm: (layer.mlp.gate_proj, layer.mlp.up_proj),
        }
        for norm, modules in readers.items():
            norm.weight.data[3] *= 60
            for module in modules:
                module.weight.data[:, 3] /= 60
    modeling.save(network, directory, checkpoint, checkpoint.spec)
    return Checkpoint.seal(directory, format="checkpoint-1", spec=checkpoint.spec, made_by={})


def error(checkpoint: Checkpoint, folder, *steps) -> float:
    """How far the engine of a recipe is from the model in float, on text like that of its calibration."""
    prompt = calibration_windows(checkpoint, TEXT, count=1, length=60)[0]
    with torch.no_grad():
        expected = modeling.load(checkpoint)(torch.tensor([prompt])).logits[0].numpy()
    made = checkpoint
    for number, step in enumerate(steps):
        (folder / f"{number}").mkdir(parents=True)
        spec = step.apply(made, folder / f"{number}", compression_context(checkpoint, TEXT))
        made = Checkpoint.seal(folder / f"{number}", format="checkpoint-1", spec=spec, made_by={})
    (folder / "engine").mkdir()
    Genai().check(made.spec)
    Genai().build(made, folder / "engine", lambda _: None)
    engine = Engine.seal(folder / "engine", format=Genai.format, spec=made.spec, made_by={})
    assert Genai().lint(engine) == []
    session = Genai().open(engine, threads=1)
    found = session.logits(prompt)
    session.close()
    return relative_error(expected, found)


@given(low=st.floats(-100, 100), width=st.floats(0, 100), symmetric=st.booleans())
def test_a_grid_of_inputs_holds_zero_and_both_ends_of_its_range(low, width, symmetric):
    high = low + width
    scale, zero = affine(low, high, symmetric=symmetric)
    assert 0 <= zero <= 255
    assert isinstance(zero, int)
    for value in (0.0, low, high):
        represented = (min(255, max(0, round(value / scale) + zero)) - zero) * scale
        assert abs(represented - value) <= scale * 1.01


def test_ranges_are_extremes_or_percentiles():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 1
    assert bounds(values, "min_max", 0) == (values.min().item(), values.max().item())
    np.testing.assert_allclose(bounds(values, "percentile", 99.0), np.percentile(values.numpy(), [1, 99]))


def test_entropy_clips_a_rare_outlier_and_keeps_a_plain_range():
    plain = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert entropy_limit(plain) > 0.95
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert entropy_limit(torch.cat([normal, torch.tensor([60.0])])) < 20


@pytest.mark.parametrize("ranges", ["dynamic", "min_max", "percentile", "entropy"])
def test_an_engine_with_inputs_in_8_bits_is_near_the_model(ranges, checkpoint, tmp_path):
    assert 0 < error(checkpoint, tmp_path, Int8(ranges=ranges)) < 0.05


@pytest.mark.parametrize("ranges", ["dynamic", "min_max"])
def test_smoothing_takes_the_harm_out_of_an_outlying_channel(ranges, outlying, tmp_path):
    plain = error(outlying, tmp_path / "plain", Int8(ranges=ranges))
    smooth = error(outlying, tmp_path / "smooth", SmoothQuant(), Int8(ranges=ranges))
    assert smooth < 0.5 * plain


@pytest.mark.parametrize(
    ("make", "location"),
    [
        (lambda: Int8(percentile=10.0), "percentile"),
        (lambda: Int8(windows=0), "windows"),
        (lambda: SmoothQuant(alpha=1.0), "alpha"),
        (lambda: SmoothQuant(tokens=0), "tokens"),
    ],
)
def test_values_outside_their_range_are_refused(make, location):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.location == location
