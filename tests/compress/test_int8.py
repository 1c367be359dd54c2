"""Test 8-bit activations: ranges against their formulas, and engines against the float model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.quantization.activation_ranges import affine_parameters, clipping_range, entropy_threshold
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
def outlier_checkpoint(checkpoint, tmp_path_factory) -> Checkpoint:
    """Return an equivalent model with one channel of each norm scaled up by 60 and its weights scaled down."""
    directory = tmp_path_factory.mktemp("outliers")
    network = modeling.load(checkpoint)
    for layer in modeling.layers(network):
        consumers = {
            layer.input_layernorm: (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            layer.post_attention_layernorm: (layer.mlp.gate_proj, layer.mlp.up_proj),
        }
        for norm, modules in consumers.items():
            norm.weight.data[3] *= 60
            for module in modules:
                module.weight.data[:, 3] /= 60
    modeling.save(network, directory, checkpoint, checkpoint.spec)
    return Checkpoint.seal(directory, format="checkpoint-1", spec=checkpoint.spec, made_by={})


def engine_error(checkpoint: Checkpoint, folder, *steps) -> float:
    """Return the relative logit error of the engine after `steps`, on calibration-like text."""
    prompt = calibration_windows(checkpoint, TEXT, count=1, length=60)[0]
    with torch.no_grad():
        expected = modeling.load(checkpoint)(torch.tensor([prompt])).logits[0].numpy()
    compressed = checkpoint
    for number, step in enumerate(steps):
        (folder / f"{number}").mkdir(parents=True)
        spec = step.apply(compressed, folder / f"{number}", compression_context(checkpoint, TEXT))
        compressed = Checkpoint.seal(folder / f"{number}", format="checkpoint-1", spec=spec, made_by={})
    (folder / "engine").mkdir()
    Genai().check(compressed.spec)
    Genai().build(compressed, folder / "engine", lambda _: None)
    engine = Engine.seal(folder / "engine", format=Genai.format, spec=compressed.spec, made_by={})
    assert Genai().lint(engine) == []
    session = Genai().open(engine, threads=1)
    logits = session.logits(prompt)
    session.close()
    return relative_error(expected, logits)


@given(low=st.floats(-100, 100), width=st.floats(0, 100), symmetric=st.booleans())
def test_affine_parameters_represent_zero_and_range(low, width, symmetric):
    high = low + width
    scale, zero_point = affine_parameters(low, high, symmetric=symmetric)
    assert 0 <= zero_point <= 255
    assert isinstance(zero_point, int)
    for value in (0.0, low, high):
        represented = (min(255, max(0, round(value / scale) + zero_point)) - zero_point) * scale
        assert abs(represented - value) <= scale * 1.01


def test_clipping_range_is_extremes_or_percentiles():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 1
    assert clipping_range(values, "min_max", 0) == (values.min().item(), values.max().item())
    np.testing.assert_allclose(clipping_range(values, "percentile", 99.0), np.percentile(values.numpy(), [1, 99]))


def test_entropy_threshold_clips_only_rare_outliers():
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert entropy_threshold(uniform) > 0.95
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert entropy_threshold(torch.cat([normal, torch.tensor([60.0])])) < 20


@pytest.mark.parametrize("ranges", ["dynamic", "min_max", "percentile", "entropy"])
def test_int8_engine_matches_the_float_model(ranges, checkpoint, tmp_path):
    assert 0 < engine_error(checkpoint, tmp_path, Int8(ranges=ranges)) < 0.05


@pytest.mark.parametrize("ranges", ["dynamic", "min_max"])
def test_smooth_quant_reduces_outlier_error(ranges, outlier_checkpoint, tmp_path):
    plain = engine_error(outlier_checkpoint, tmp_path / "plain", Int8(ranges=ranges))
    smooth = engine_error(outlier_checkpoint, tmp_path / "smooth", SmoothQuant(), Int8(ranges=ranges))
    assert smooth < 0.5 * plain


@pytest.mark.parametrize(
    ("build_step", "location"),
    [
        (lambda: Int8(percentile=10.0), "percentile"),
        (lambda: Int8(windows=0), "windows"),
        (lambda: SmoothQuant(alpha=1.0), "alpha"),
        (lambda: SmoothQuant(tokens=0), "tokens"),
    ],
)
def test_values_outside_their_range_are_rejected(build_step, location):
    with pytest.raises(ConfigError) as error:
        build_step()
    assert error.value.location == location
