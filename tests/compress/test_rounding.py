"""Ways of rounding, each against an independent formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.compress.optimal_brain import inverse_hessian_cholesky
from edgeopt.compress.quantization import hqq, rounding
from edgeopt.compress.quantization.gptq import Gptq, compensated
from edgeopt.compress.quantization.hqq import Hqq
from edgeopt.compress.quantization.k_quant import KQuant, fit_scales
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import QuantizationScheme
from edgeopt.errors import ConfigError

ROUNDINGS = {"rtn": Rtn(), "rtn unclipped": Rtn(clip=False), "k_quant": KQuant(), "hqq": Hqq(), "gptq": Gptq()}
schemes = st.builds(
    QuantizationScheme, bits=st.sampled_from([2, 4, 8]), block_size=st.sampled_from([16, 32]), symmetric=st.booleans()
)


def matrix(seed: int, rows: int = 8, columns: int = 64, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def inputs(seed: int, columns: int = 64, tokens: int = 256) -> torch.Tensor:
    """Tokens whose channels differ in energy and depend on one another, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 3 * torch.eye(columns)
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator)


def hessian(x: torch.Tensor) -> torch.Tensor:
    return (x.double().T @ x.double()) / len(x)


def statistic(how: rounding.Rounding, x: torch.Tensor) -> torch.Tensor | None:
    return {"none": None, "second_moment": hessian(x).diagonal(), "hessian": hessian(x)}[how.INPUT_STATISTIC]


@pytest.mark.parametrize("how", ROUNDINGS.values(), ids=ROUNDINGS.keys())
class TestEveryRounding:
    @given(grid=schemes, seed=st.integers(0, 1000))
    @settings(max_examples=15, deadline=None)
    def test_codes_are_on_the_grid_and_scales_are_exact_in_fp16(self, how, grid, seed):
        found = how.round(matrix(seed), grid, statistic(how, inputs(seed)))
        assert found.codes.dtype == found.zero_points.dtype == torch.uint8
        assert int(found.codes.max()) < 2**grid.bits
        assert found.scales.shape == found.zero_points.shape == (8, 64 // grid.block_size)
        assert torch.equal(found.scales, found.scales.half().float())
        if grid.symmetric:
            assert (found.zero_points == 2 ** (grid.bits - 1)).all()

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_more_bits_lose_less(self, how, symmetric):
        weight, x = matrix(3), inputs(3)
        lost = []
        for bits in (2, 4, 8):
            found = how.round(
                weight, QuantizationScheme(bits=bits, block_size=16, symmetric=symmetric), statistic(how, x)
            )
            lost.append(float(((found.weight - weight) @ x.T).square().mean()))
        assert lost[0] > 4 * lost[1] > 64 * lost[2]

    @pytest.mark.parametrize("weight", [torch.zeros(2, 32), torch.full((2, 32), 0.25), torch.full((2, 32), -3.0)])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_constant_blocks_survive(self, how, weight, symmetric):
        grid = QuantizationScheme(bits=4, block_size=16, symmetric=symmetric)
        found = how.round(weight, grid, statistic(how, inputs(0, columns=32)))
        assert torch.allclose(found.weight, weight, atol=1e-3)

    def test_the_same_matrix_rounds_alike_twice(self, how):
        grid, x = QuantizationScheme(bits=4, block_size=32, symmetric=False), inputs(5)
        first, second = (how.round(matrix(5), grid, statistic(how, x)) for _ in range(2))
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.scales, second.scales)


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_rounding_to_nearest_is_off_by_a_step_at_most(seed, bits):
    """Half a step of its own, half of the rounded zero-point, and a little for a scale that is exact in fp16."""
    weight = matrix(seed)
    found = Rtn(clip=False).round(weight, QuantizationScheme(bits=bits, block_size=16, symmetric=False), None)
    step = found.scales.repeat_interleave(16, dim=1)
    assert ((found.weight - weight).abs() <= step * 1.25).all()


@given(seed=st.integers(0, 1000), symmetric=st.booleans())
@settings(max_examples=25, deadline=None)
def test_clipping_never_loses_more_than_the_whole_range(seed, symmetric):
    weight, grid = matrix(seed).pow(3), QuantizationScheme(bits=4, block_size=32, symmetric=symmetric)
    clipped, whole = Rtn().round(weight, grid, None), Rtn(clip=False).round(weight, grid, None)
    assert (clipped.weight - weight).square().sum() <= (whole.weight - weight).square().sum()


def test_a_fitted_scale_is_the_least_squares_solution():
    weight, importance = matrix(1, rows=1, columns=16)[:, None, :], torch.rand(1, 16) + 0.1
    scales, zero_points = torch.tensor([[0.01]]), torch.tensor([[8.0]])
    codes = rounding.encode(weight, scales, zero_points, 4)
    root = importance.sqrt().double().numpy().ravel()
    centred = (codes - 8).double().numpy().ravel()
    expected, *_ = np.linalg.lstsq((root * centred)[:, None], root * weight.double().numpy().ravel(), rcond=None)
    found = fit_scales(weight, scales, zero_points, 4, importance, rounds=1)
    assert float(found) == pytest.approx(expected[0], rel=1e-3)


def test_k_quant_loses_less_weighted_error_than_rounding_to_nearest():
    weight, x, grid = matrix(2, rows=32), inputs(2), QuantizationScheme(bits=4, block_size=32, symmetric=False)
    energy = hessian(x).diagonal().float()

    def lost(how):
        found = how.round(weight, grid, statistic(how, x))
        return float(((found.weight - weight).square() * energy).sum())

    assert lost(KQuant()) < 0.95 * lost(Rtn()) < lost(Rtn(clip=False))


def test_the_threshold_of_hqq_is_soft_thresholding_for_the_absolute_norm():
    values = torch.linspace(-1, 1, 41)
    soft = values.sign() * (values.abs() - 0.25).clamp(min=0)
    assert torch.allclose(hqq.shrink(values, beta=4.0, norm=1.0), soft)


def test_hqq_keeps_ordinary_weights_when_one_is_far_off():
    weight = matrix(4, rows=16, columns=32)
    weight[:, 5] = 0.4
    grid = QuantizationScheme(bits=4, block_size=32, symmetric=False)
    ordinary = torch.arange(32) != 5

    def lost(how):
        return float((how.round(weight, grid, None).weight - weight)[:, ordinary].abs().pow(0.7).sum())

    assert lost(Hqq()) < lost(Rtn(clip=False))


def brain_surgeon(weight, hessian, scales, zero_points, bits):
    """Equations (2) and (3) of the GPTQ paper, with the inverse of what remains computed anew for each column."""
    work, codes = weight.double().clone(), torch.zeros_like(weight)
    columns = weight.shape[1]
    for q in range(columns):
        inverse = torch.linalg.inv(hessian[q:, q:])
        scale, zero = scales[:, q].double(), zero_points[:, q].double()
        codes[:, q] = ((work[:, q] / scale).round() + zero).clamp(0, 2**bits - 1).float()
        lost = (work[:, q] - (codes[:, q].double() - zero) * scale) / inverse[0, 0]
        work[:, q:] -= lost[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("columns", [32, 160])
def test_gptq_computes_what_its_equations_say(columns):
    weight, second_moment = matrix(7, columns=columns), hessian(inputs(7, columns=columns, tokens=600))
    damped = second_moment + 0.01 * second_moment.diagonal().mean() * torch.eye(columns)
    scales, zero_points = torch.full((8, columns), 0.008), torch.full((8, columns), 8.0)
    expected = brain_surgeon(weight, damped, scales, zero_points, 4)
    found = compensated(weight, inverse_hessian_cholesky(second_moment, 0.01), scales, zero_points, 4)
    assert (found == expected).float().mean() > 0.99, "rounding of halves may differ between precisions"


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_changes_the_output_less_than_rounding_to_nearest(act_order):
    weight, x, grid = matrix(8, rows=32), inputs(8), QuantizationScheme(bits=4, block_size=32, symmetric=False)

    def lost(how):
        found = how.round(weight, grid, statistic(how, x))
        return float(((found.weight - weight) @ x.T).square().sum())

    assert lost(Gptq(act_order=act_order)) < 0.7 * lost(Rtn())


def test_channels_that_are_always_zero_do_not_stop_gptq():
    x = inputs(9)
    x[:, 10:20] = 0
    found = Gptq().round(matrix(9), QuantizationScheme(bits=4, block_size=32, symmetric=False), hessian(x))
    assert torch.isfinite(found.weight).all()


@pytest.mark.parametrize(
    ("make", "location"),
    [
        (lambda: Gptq(damping=0.0), "damping"),
        (lambda: Hqq(norm=2.0), "norm"),
        (lambda: Hqq(iterations=0), "iterations"),
    ],
)
def test_values_outside_their_range_are_refused(make, location):
    with pytest.raises(ConfigError, match=r"must be|outside its range") as caught:
        make()
    assert caught.value.location == location
