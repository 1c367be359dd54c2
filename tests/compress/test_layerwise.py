"""Layer by layer: what each matrix is told of its inputs is what really reaches it."""

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

WINDOWS = [[1, 5, 9, 2, 7, 7, 3, 8, 11, 40], [4, 4, 100, 20, 30, 6]]


@pytest.fixture
def network(tiny_model, tmp_path):
    return modeling.load(import_checkpoint(tiny_model, tmp_path))


def spied(monkeypatch, kind):
    """The statistic handed to each rounding, in order."""
    seen = []
    original = KQuant.round

    def spy(self, weight, grid, statistic):
        seen.append(statistic)
        return original(self, weight, grid, statistic)

    monkeypatch.setattr(KQuant, "round", spy)
    monkeypatch.setattr(KQuant, "INPUT_STATISTIC", kind)
    return seen


@pytest.mark.parametrize("kind", ["second_moment", "hessian"])
def test_each_unit_is_weighted_with_the_inputs_that_rounded_layers_produce(network, monkeypatch, kind):
    seen = spied(monkeypatch, kind)
    spec = Quantize(weights="int4", block_size=16).plan(specs_of(network))
    quantize_network(network, spec.schemes, KQuant(), WINDOWS, lambda _: None)
    reached = []
    down = modeling.layers(network)[-1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for window in WINDOWS:
            network(torch.tensor([window]))
    tokens = torch.cat(reached).double()
    expected = tokens.square().mean(dim=0) if kind == "second_moment" else tokens.T @ tokens / len(tokens)
    assert len(seen) == 1 + 2 * 4, "the tied tables, and four units in each of two layers"
    assert torch.allclose(seen[-1], expected, rtol=1e-4, atol=1e-9)


def specs_of(network):
    from edgeopt.core.model_spec import ModelSpec

    return ModelSpec.from_hf_config(network.config.to_dict())


def test_the_network_computes_with_the_rounded_weights_afterwards(network):
    spec = Quantize(weights="int4", block_size=16).plan(specs_of(network))
    rounded = quantize_network(network, spec.schemes, Gptq(), WINDOWS, lambda _: None)
    names = {name for names in modeling.units(network).values() for name in names}
    assert set(rounded) == names - {"lm_head"}, "the tied table stands under the name of the embedding"
    for name, matrix in rounded.items():
        assert torch.equal(network.get_submodule(name).weight, matrix.weight), name


@pytest.mark.parametrize("rounding", [Rtn(), KQuant(), Gptq()], ids=lambda rounding: type(rounding).__name__)
def test_a_corrected_bias_keeps_the_mean_of_every_output(rounding, network):
    before = copy.deepcopy(network)
    spec = Quantize(weights="int2", block_size=32, bias_correction=True).plan(specs_of(network))
    rounded = quantize_network(network, spec.schemes, rounding, WINDOWS, lambda _: None)
    for name in rounded.keys() - {"model.embed_tokens"}:
        seen = []
        module = network.get_submodule(name)
        handle = module.register_forward_hook(lambda _, x, y, seen=seen: seen.append((x[0][0], y[0])))
        with torch.no_grad():
            for window in WINDOWS:
                network(torch.tensor([window]))
            inputs, outputs = (torch.cat(parts) for parts in zip(*seen, strict=True))
            expected = before.get_submodule(name)(inputs).mean(dim=0)
        handle.remove()
        assert torch.allclose(outputs.mean(dim=0), expected, atol=1e-6), name


def test_matrices_that_are_not_asked_for_stay_as_they_are(network):
    spec = Quantize(weights="int4", overrides={"*.qkv": "float"}).plan(specs_of(network))
    before = network.get_submodule("model.layers.0.self_attn.q_proj").weight.clone()
    rounded = quantize_network(network, spec.schemes, Rtn(), [], lambda _: None)
    assert torch.equal(network.get_submodule("model.layers.0.self_attn.q_proj").weight, before)
    assert "model.layers.0.self_attn.q_proj" not in rounded
