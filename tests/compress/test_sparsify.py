"""Test sparsity patterns and the choice of weights against the formulas of the papers."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import specs
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.optimal_brain import inverse_hessian_cholesky
from edgeopt.compress.pruning.sparsify import Sparsify, pruning_mask, sparsegpt
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError

METHODS = ("magnitude", "wanda", "sparsegpt")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


def random_hessian(columns: int, seed: int = 0) -> torch.Tensor:
    """Return E[x xᵀ] of random inputs with correlated channels, float64, shape (columns, columns)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(columns, columns, generator=generator, dtype=torch.float64) + 3 * torch.eye(columns))
    return x.T @ x / 512


def matrix(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_two_of_four_weights_are_zero(method, checkpoint, tmp_path):
    step = Sparsify(pattern="2:4", method=method, windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, compression_context(checkpoint))
    assert spec.sparsity == "2:4"
    network = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    for layer in modeling.layers(network):
        for module in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            assert ((module.weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
    assert set(json.loads((tmp_path / "artifacts" / "sparsify.json").read_text())["zeros"].values()) == {0.5}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_unstructured_ratio_of_weights_is_zero(method, ratio, checkpoint, tmp_path):
    step = Sparsify(pattern="unstructured", method=method, ratio=ratio, windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, compression_context(checkpoint))
    zeros = json.loads((tmp_path / "artifacts" / "sparsify.json").read_text())["zeros"]
    assert set(zeros.values()) == {ratio}
    assert spec.parameters == checkpoint.spec.parameters, "zeros are stored like other weights"


@given(st.integers(0, 10**6), st.sampled_from(["2:4", "unstructured"]))
def test_pruning_mask_selects_lowest_scores(seed, pattern):
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
    mask = pruning_mask(scores, pattern, 0.5)
    groups = zip(*(t.reshape(-1, 4 if pattern == "2:4" else 16) for t in (scores, mask)), strict=True)
    for group, masked in groups:
        assert masked.sum() == len(group) // 2
        assert group[masked].max() <= group[~masked].min()


def optimal_brain_surgeon(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Return 2:4 sparse weights; invert the Hessian of the remaining columns for every column."""
    result, columns = weight.copy(), weight.shape[1]
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    for first in range(0, columns, 4):
        losses = [result[:, c] ** 2 / inverses[c][0, 0] for c in range(first, first + 4)]
        pruned = np.argsort(np.array(losses), axis=0)[:2]
        for c in range(first, first + 4):
            for row in np.nonzero((pruned == c - first).any(axis=0))[0]:
                result[row, c:] -= result[row, c] / inverses[c][0, 0] * inverses[c][0]
                result[row, c] = 0.0
    return result


def test_sparsegpt_matches_optimal_brain_surgeon():
    weight, hessian = matrix(5, 16), random_hessian(16)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    sparse = sparsegpt(weight, inverse_hessian_cholesky(hessian, 0.01), "2:4", 0.5)
    torch.testing.assert_close(
        sparse.double(),
        torch.from_numpy(optimal_brain_surgeon(weight.double().numpy(), damped.numpy())),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_sparsegpt_error_is_below_magnitude_pruning(pattern):
    weight, hessian = matrix(32, 192), random_hessian(192)

    def output_error(sparse: torch.Tensor) -> float:
        change = (sparse - weight).double()
        return float(((change @ hessian) * change).sum())

    compensated = sparsegpt(weight, inverse_hessian_cholesky(hessian, 0.01), pattern, 0.5)
    magnitude = weight.masked_fill(pruning_mask(weight.abs(), pattern, 0.5), 0.0)
    assert (compensated == 0).float().mean() == (magnitude == 0).float().mean() == 0.5
    assert output_error(compensated) < 0.8 * output_error(magnitude)


def test_invalid_values_are_rejected():
    with pytest.raises(ConfigError, match=r"ratio: `ratio` must be 0\.5 for the pattern 2:4, got 0\.3"):
        Sparsify(ratio=0.3)
    with pytest.raises(ConfigError, match=r"ratio: .*must be between 0 and 1"):
        Sparsify(pattern="unstructured", ratio=1.0)
    with pytest.raises(ConfigError, match=r"pattern: .*column count is a multiple of 4, got 126"):
        Sparsify().plan(specs.llama(intermediate=126))
