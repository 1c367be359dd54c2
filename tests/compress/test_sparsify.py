"""Sparsity has its pattern exactly, and takes the weights that its paper's formula says."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import specs
from support.workshops import workshop

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.optimal_brain import inverse_hessian_cholesky
from edgeopt.compress.pruning.sparsify import Sparsify, least, sparsegpt
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError

METHODS = ("magnitude", "wanda", "sparsegpt")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


def second_moment(columns: int, seed: int = 0) -> torch.Tensor:
    """Mean of x xᵀ of inputs whose channels depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(columns, columns, generator=generator, dtype=torch.float64) + 3 * torch.eye(columns))
    return x.T @ x / 512


def matrix(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_two_of_every_four_weights_are_zero(method, checkpoint, tmp_path):
    step = Sparsify(pattern="2:4", method=method, windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint))
    assert spec.sparsity == "2:4"
    network = modeling.load(Checkpoint.seal(tmp_path, format="checkpoint-1", spec=spec, made_by={}))
    for layer in modeling.layers(network):
        for module in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            assert ((module.weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
    assert set(json.loads((tmp_path / "artifacts" / "sparsify.json").read_text())["zeros"].values()) == {0.5}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_the_ratio_of_weights_is_zero(method, ratio, checkpoint, tmp_path):
    step = Sparsify(pattern="unstructured", method=method, ratio=ratio, windows=4, window_tokens=64)
    spec = step.apply(checkpoint, tmp_path, workshop(checkpoint))
    zeros = json.loads((tmp_path / "artifacts" / "sparsify.json").read_text())["zeros"]
    assert set(zeros.values()) == {ratio}
    assert spec.parameters == checkpoint.spec.parameters, "zeros are stored like all weights"


@given(st.integers(0, 10**6), st.sampled_from(["2:4", "unstructured"]))
def test_no_score_that_is_kept_is_below_one_that_is_not(seed, pattern):
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
    taken = least(scores, pattern, 0.5)
    groups = zip(*(t.reshape(-1, 4 if pattern == "2:4" else 16) for t in (scores, taken)), strict=True)
    for row, cut in groups:
        assert cut.sum() == len(row) // 2
        assert row[cut].max() <= row[~cut].min()


def surgeon(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """2:4 by optimal brain surgery, with the inverse of what is left of the Hessian taken anew for each column."""
    work, columns = weight.copy(), weight.shape[1]
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    for first in range(0, columns, 4):
        costs = [work[:, c] ** 2 / inverses[c][0, 0] for c in range(first, first + 4)]
        cut = np.argsort(np.array(costs), axis=0)[:2]
        for c in range(first, first + 4):
            for row in np.nonzero((cut == c - first).any(axis=0))[0]:
                work[row, c:] -= work[row, c] / inverses[c][0, 0] * inverses[c][0]
                work[row, c] = 0.0
    return work


def test_sparsegpt_is_optimal_brain_surgery_a_column_at_a_time():
    weight, hessian = matrix(5, 16), second_moment(16)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    found = sparsegpt(weight, inverse_hessian_cholesky(hessian, 0.01), "2:4", 0.5)
    torch.testing.assert_close(
        found.double(), torch.from_numpy(surgeon(weight.double().numpy(), damped.numpy())), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_sparsegpt_changes_the_output_less_than_cutting_small_weights(pattern):
    weight, hessian = matrix(32, 192), second_moment(192)

    def lost(found: torch.Tensor) -> float:
        change = (found - weight).double()
        return float(((change @ hessian) * change).sum())

    made = sparsegpt(weight, inverse_hessian_cholesky(hessian, 0.01), pattern, 0.5)
    plain = weight.masked_fill(least(weight.abs(), pattern, 0.5), 0.0)
    assert (made == 0).float().mean() == (plain == 0).float().mean() == 0.5
    assert lost(made) < 0.8 * lost(plain)


def test_values_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match="ratio: 2:4 makes one half"):
        Sparsify(ratio=0.3)
    with pytest.raises(ConfigError, match=r"ratio: .*outside its range"):
        Sparsify(pattern="unstructured", ratio=1.0)
    with pytest.raises(ConfigError, match="pattern: the matrix side 126 is no multiple of 4"):
        Sparsify().plan(specs.llama(intermediate=126))
