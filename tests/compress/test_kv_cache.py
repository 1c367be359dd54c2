"""Test the calibrated KV cache: its ranges, its stored scales and the engine that uses them."""

import json

import numpy as np
import pytest
import torch
from support import adapter_checkpoints
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.quantization.kv_cache import KvCache, cached_keys_and_values, clipping_limit
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.runtime import Genai

PROMPT = list(range(1, 60))
TEXT = Text(name="text", documents=tuple(f"def f{n}(x):\n    return x + {n}\n" * 6 for n in range(8)))


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


def apply_step(step, checkpoint: Checkpoint, directory) -> Checkpoint:
    directory.mkdir()
    spec = step.apply(checkpoint, directory, compression_context(checkpoint, TEXT))
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


def test_cached_values_match_the_value_projection(checkpoint):
    network, windows = modeling.load(checkpoint), [[5, 6, 7], [8, 9, 10, 11]]
    (keys, values), *_ = cached_keys_and_values(network, windows)
    layer, sizes = modeling.layers(network)[0], checkpoint.spec.layers[0]
    with torch.no_grad():
        normed = layer.input_layernorm(network.get_input_embeddings()(torch.tensor([windows[0]])))
        expected = layer.self_attn.v_proj(normed)[0]
    assert keys.shape == values.shape == (7, sizes.kv_heads * checkpoint.spec.head_size)
    torch.testing.assert_close(values[:3], expected)


def test_clipping_limit_is_a_percentile_of_magnitudes():
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])
    limit = clipping_limit(values, 95.0, per_channel=True)
    expected = np.percentile(values.abs().numpy(), 95, axis=0)
    np.testing.assert_allclose(limit.numpy(), expected, rtol=0.02)
    assert clipping_limit(values, 100.0, per_channel=False).tolist() == [values.abs().max().item()]


@pytest.mark.parametrize("per_channel", [True, False])
def test_logit_error_grows_with_fewer_bits(per_channel, checkpoint, tmp_path):
    with torch.no_grad():
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
    errors = []
    for bits in (8, 4):
        quantized = apply_step(KvCache(bits=bits, per_channel=per_channel), checkpoint, tmp_path / f"{bits}")
        (tmp_path / f"engine{bits}").mkdir()
        Genai().check(quantized.spec)
        Genai().build(quantized, tmp_path / f"engine{bits}", lambda _: None)
        engine = Engine.seal(tmp_path / f"engine{bits}", format=Genai.format, spec=quantized.spec, made_by={})
        session = Genai().open(engine, threads=1)
        errors.append(relative_error(expected, session.logits(PROMPT)))
        assert len(list(session.generate(PROMPT, 8, stop_at_end=False))) == 8
        session.close()
    assert 0 < errors[0] < 0.05
    assert errors[0] < errors[1] < 1


def test_stored_scales_have_a_row_per_layer(checkpoint, tmp_path):
    quantized = apply_step(KvCache(bits=4), checkpoint, tmp_path / "kv")
    document = json.loads((quantized.directory / modeling.KV_CACHE).read_text())
    assert document["qmax"] == 8
    assert np.array(document["scales"]["k_scales"]).shape == (2, 32)


def test_ranges_cover_base_and_adapters(checkpoint, tmp_path):
    def scales(source: Checkpoint, name: str) -> np.ndarray:
        quantized = apply_step(KvCache(), source, tmp_path / name)
        rows = json.loads((quantized.directory / modeling.KV_CACHE).read_text())["scales"]
        return np.array([rows["k_scales"], rows["v_scales"]])

    separate = adapter_checkpoints.add_adapter(checkpoint, tmp_path / "beside", "r4")
    merged = adapter_checkpoints.merge_adapter(separate, tmp_path / "merged", "r4")
    expected = np.maximum(scales(checkpoint, "base"), scales(merged, "adapted"))
    np.testing.assert_allclose(scales(separate, "both"), expected, rtol=1e-4)


def test_later_weight_changes_are_rejected(checkpoint):
    with pytest.raises(ConfigError, match="cannot follow kv_cache"):
        PruneWidth().plan(KvCache().plan(checkpoint.spec))
    with pytest.raises(ConfigError, match="a second kv_cache"):
        KvCache().plan(KvCache().plan(checkpoint.spec))


def test_percentile_outside_its_range_is_rejected():
    with pytest.raises(ConfigError) as error:
        KvCache(percentile=10.0)
    assert error.value.location == "percentile"
