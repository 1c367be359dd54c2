"""Test that layerwise quantization uses the inputs that the quantized layers produce."""

import copy

import pytest
import torch

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.quantization.gptq import Gptq
from edgeopt.compress.quantization.k_quant import KQuant
from edgeopt.compress.quantization.layerwise import quantize_network
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import ModelSpec

WINDOWS = [[1, 5, 9, 2, 7, 7, 3, 8, 11, 40], [4, 4, 100, 20, 30, 6]]


@pytest.fixture
def network(tiny_model, tmp_path):
    return modeling.load(import_checkpoint(tiny_model, tmp_path))


def spec_of(network) -> ModelSpec:
    return ModelSpec.from_hf_config(network.config.to_dict())


def record_statistics(monkeypatch, kind):
    """Make KQuant request `kind`; return the list to which it appends every statistic it gets."""
    statistics = []
    original = KQuant.round

    def recording_round(self, weight, scheme, statistic):
        statistics.append(statistic)
        return original(self, weight, scheme, statistic)

    monkeypatch.setattr(KQuant, "round", recording_round)
    monkeypatch.setattr(KQuant, "INPUT_STATISTIC", kind)
    return statistics


@pytest.mark.parametrize("kind", ["second_moment", "hessian"])
def test_statistics_come_from_quantized_layers(network, monkeypatch, kind):
    statistics = record_statistics(monkeypatch, kind)
    spec = Quantize(weights="int4", block_size=16).plan(spec_of(network))
    quantize_network(network, spec.schemes, KQuant(), WINDOWS, lambda _: None)
    inputs = []
    down = modeling.layers(network)[-1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in WINDOWS:
            network(torch.tensor([window]))
    tokens = torch.cat(inputs).double()
    expected = tokens.square().mean(dim=0) if kind == "second_moment" else tokens.T @ tokens / len(tokens)
    assert len(statistics) == 1 + 2 * 4, (
        "one for the tied embedding and lm_head, and one for each of four units in two layers"
    )
    assert torch.allclose(statistics[-1], expected, rtol=1e-4, atol=1e-9)


def test_network_holds_the_dequantized_weights(network):
    spec = Quantize(weights="int4", block_size=16).plan(spec_of(network))
    quantized = quantize_network(network, spec.schemes, Gptq(), WINDOWS, lambda _: None)
    names = {name for names in modeling.unit_modules(network).values() for name in names}
    assert set(quantized) == names - {"lm_head"}, "the tied matrix is listed under the embedding"
    for name, matrix in quantized.items():
        assert torch.equal(network.get_submodule(name).weight, matrix.weight), name


@pytest.mark.parametrize("rounding", [Rtn(), KQuant(), Gptq()], ids=lambda rounding: type(rounding).__name__)
def test_bias_correction_keeps_the_output_mean(rounding, network):
    before = copy.deepcopy(network)
    spec = Quantize(weights="int2", block_size=32, bias_correction=True).plan(spec_of(network))
    quantized = quantize_network(network, spec.schemes, rounding, WINDOWS, lambda _: None)
    for name in quantized.keys() - {"model.embed_tokens"}:
        calls = []
        module = network.get_submodule(name)
        handle = module.register_forward_hook(lambda _, x, y, calls=calls: calls.append((x[0][0], y[0])))
        with torch.no_grad():
            for window in WINDOWS:
                network(torch.tensor([window]))
            inputs, outputs = (torch.cat(tensors) for tensors in zip(*calls, strict=True))
            expected = before.get_submodule(name)(inputs).mean(dim=0)
        handle.remove()
        assert torch.allclose(outputs.mean(dim=0), expected, atol=1e-6), name


def test_units_without_scheme_stay_unchanged(network):
    spec = Quantize(weights="int4", overrides={"*.qkv": "float"}).plan(spec_of(network))
    before = network.get_submodule("model.layers.0.self_attn.q_proj").weight.clone()
    quantized = quantize_network(network, spec.schemes, Rtn(), [], lambda _: None)
    assert torch.equal(network.get_submodule("model.layers.0.self_attn.q_proj").weight, before)
    assert "model.layers.0.self_attn.q_proj" not in quantized
