"""Test every rounding method against independent formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.compress.optimal_brain import inverse_hessian_cholesky
from edgeopt.compress.quantization import hqq, rounding
from edgeopt.compress.quantization.gptq import Gptq, quantize_columns
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
    """Return tokens with correlated channels of different variance, like activations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 3 * torch.eye(columns)
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator)


def hessian(x: torch.Tensor) -> torch.Tensor:
    """Return E[x xᵀ], float64, shape (columns, columns)."""
    return (x.double().T @ x.double()) / len(x)


def statistic(method: rounding.Rounding, x: torch.Tensor) -> torch.Tensor | None:
    """Return the statistic of the inputs `x` that `method` requires."""
    return {"none": None, "second_moment": hessian(x).diagonal(), "hessian": hessian(x)}[method.INPUT_STATISTIC]


@pytest.mark.parametrize("method", ROUNDINGS.values(), ids=ROUNDINGS.keys())
class TestEveryRounding:
    @given(scheme=schemes, seed=st.integers(0, 1000))
    @settings(max_examples=15, deadline=None)
    def test_codes_fit_and_scales_are_fp16(self, method, scheme, seed):
        quantized = method.round(matrix(seed), scheme, statistic(method, inputs(seed)))
        assert quantized.codes.dtype == quantized.zero_points.dtype == torch.uint8
        assert int(quantized.codes.max()) < 2**scheme.bits
        assert quantized.scales.shape == quantized.zero_points.shape == (8, 64 // scheme.block_size)
        assert torch.equal(quantized.scales, quantized.scales.half().float())
        if scheme.symmetric:
            assert (quantized.zero_points == 2 ** (scheme.bits - 1)).all()

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_error_falls_with_more_bits(self, method, symmetric):
        weight, x = matrix(3), inputs(3)
        errors = []
        for bits in (2, 4, 8):
            quantized = method.round(
                weight, QuantizationScheme(bits=bits, block_size=16, symmetric=symmetric), statistic(method, x)
            )
            errors.append(float(((quantized.weight - weight) @ x.T).square().mean()))
        assert errors[0] > 4 * errors[1] > 64 * errors[2]

    @pytest.mark.parametrize("weight", [torch.zeros(2, 32), torch.full((2, 32), 0.25), torch.full((2, 32), -3.0)])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_constant_blocks_are_preserved(self, method, weight, symmetric):
        scheme = QuantizationScheme(bits=4, block_size=16, symmetric=symmetric)
        quantized = method.round(weight, scheme, statistic(method, inputs(0, columns=32)))
        assert torch.allclose(quantized.weight, weight, atol=1e-3)

    def test_rounding_is_deterministic(self, method):
        scheme, x = QuantizationScheme(bits=4, block_size=32, symmetric=False), inputs(5)
        first, second = (method.round(matrix(5), scheme, statistic(method, x)) for _ in range(2))
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.scales, second.scales)


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_rtn_error_is_at_most_about_one_step(seed, bits):
    """Half a step comes from the code, half from the rounded zero-point, and a little from the fp16 scale."""
    weight = matrix(seed)
    quantized = Rtn(clip=False).round(weight, QuantizationScheme(bits=bits, block_size=16, symmetric=False), None)
    step = quantized.scales.repeat_interleave(16, dim=1)
    assert ((quantized.weight - weight).abs() <= step * 1.25).all()


@given(seed=st.integers(0, 1000), symmetric=st.booleans())
@settings(max_examples=25, deadline=None)
def test_clipping_never_increases_squared_error(seed, symmetric):
    weight, scheme = matrix(seed).pow(3), QuantizationScheme(bits=4, block_size=32, symmetric=symmetric)
    clipped, full_range = Rtn().round(weight, scheme, None), Rtn(clip=False).round(weight, scheme, None)
    assert (clipped.weight - weight).square().sum() <= (full_range.weight - weight).square().sum()


def test_fitted_scale_is_the_least_squares_solution():
    weight, importance = matrix(1, rows=1, columns=16)[:, None, :], torch.rand(1, 16) + 0.1
    scales, zero_points = torch.tensor([[0.01]]), torch.tensor([[8.0]])
    codes = rounding.quantize(weight, scales, zero_points, 4)
    root = importance.sqrt().double().numpy().ravel()
    centered = (codes - 8).double().numpy().ravel()
    expected, *_ = np.linalg.lstsq((root * centered)[:, None], root * weight.double().numpy().ravel(), rcond=None)
    fitted = fit_scales(weight, scales, zero_points, 4, importance, rounds=1)
    assert float(fitted) == pytest.approx(expected[0], rel=1e-3)


def test_k_quant_reduces_weighted_error_of_rtn():
    weight, x, scheme = matrix(2, rows=32), inputs(2), QuantizationScheme(bits=4, block_size=32, symmetric=False)
    second_moment = hessian(x).diagonal().float()

    def error(method):
        quantized = method.round(weight, scheme, statistic(method, x))
        return float(((quantized.weight - weight).square() * second_moment).sum())

    assert error(KQuant()) < 0.95 * error(Rtn()) < error(Rtn(clip=False))


def test_hqq_shrink_is_soft_threshold_for_l1():
    values = torch.linspace(-1, 1, 41)
    soft = values.sign() * (values.abs() - 0.25).clamp(min=0)
    assert torch.allclose(hqq.shrink(values, beta=4.0, norm=1.0), soft)


def test_hqq_protects_weights_next_to_an_outlier():
    weight = matrix(4, rows=16, columns=32)
    weight[:, 5] = 0.4
    scheme = QuantizationScheme(bits=4, block_size=32, symmetric=False)
    ordinary = torch.arange(32) != 5

    def error(method):
        return float((method.round(weight, scheme, None).weight - weight)[:, ordinary].abs().pow(0.7).sum())

    assert error(Hqq()) < error(Rtn(clip=False))


def optimal_brain_quantization(weight, hessian, scales, zero_points, bits):
    """Apply equations (2) and (3) of the GPTQ paper; invert the remaining Hessian for each column."""
    work, codes = weight.double().clone(), torch.zeros_like(weight)
    columns = weight.shape[1]
    for q in range(columns):
        inverse = torch.linalg.inv(hessian[q:, q:])
        scale, zero_point = scales[:, q].double(), zero_points[:, q].double()
        codes[:, q] = ((work[:, q] / scale).round() + zero_point).clamp(0, 2**bits - 1).float()
        error = (work[:, q] - (codes[:, q].double() - zero_point) * scale) / inverse[0, 0]
        work[:, q:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("columns", [32, 160])
def test_gptq_matches_the_optimal_brain_equations(columns):
    weight, input_hessian = matrix(7, columns=columns), hessian(inputs(7, columns=columns, tokens=600))
    damped = input_hessian + 0.01 * input_hessian.diagonal().mean() * torch.eye(columns)
    scales, zero_points = torch.full((8, columns), 0.008), torch.full((8, columns), 8.0)
    expected = optimal_brain_quantization(weight, damped, scales, zero_points, 4)
    codes = quantize_columns(weight, inverse_hessian_cholesky(input_hessian, 0.01), scales, zero_points, 4)
    assert (codes == expected).float().mean() > 0.99, (
        "values halfway between two codes may round differently in float32 and float64"
    )


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_reduces_output_error_of_rtn(act_order):
    weight, x, scheme = matrix(8, rows=32), inputs(8), QuantizationScheme(bits=4, block_size=32, symmetric=False)

    def error(method):
        quantized = method.round(weight, scheme, statistic(method, x))
        return float(((quantized.weight - weight) @ x.T).square().sum())

    assert error(Gptq(act_order=act_order)) < 0.7 * error(Rtn())


def test_gptq_accepts_channels_that_are_always_zero():
    x = inputs(9)
    x[:, 10:20] = 0
    quantized = Gptq().round(matrix(9), QuantizationScheme(bits=4, block_size=32, symmetric=False), hessian(x))
    assert torch.isfinite(quantized.weight).all()


@pytest.mark.parametrize(
    ("build_rounding", "location"),
    [
        (lambda: Gptq(damping=0.0), "damping"),
        (lambda: Hqq(norm=2.0), "norm"),
        (lambda: Hqq(iterations=0), "iterations"),
    ],
)
def test_values_outside_their_range_are_rejected(build_rounding, location):
    with pytest.raises(ConfigError, match="must be") as error:
        build_rounding()
    assert error.value.location == location
