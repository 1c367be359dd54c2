from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeopt.errors import MeasureError
from edgeopt.measure.stats.divergence import kl_divergence, log_softmax, relative_error, top1_agreement

tables = arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


@given(tables)
def test_probabilities_sum_to_one(logits):
    assert np.exp(log_softmax(logits)).sum(axis=-1) == pytest.approx(1, abs=1e-5)


def test_log_softmax_matches_formula():
    logits = [0.5, -1.0, 2.0]
    expected = [x - math.log(sum(math.exp(y) for y in logits)) for x in logits]
    assert log_softmax(np.array(logits, dtype=np.float32)) == pytest.approx(expected, abs=1e-6)


@given(tables, st.floats(-100, 100, width=32))
def test_log_softmax_ignores_constant_offset(logits, constant):
    assert log_softmax(logits + constant) == pytest.approx(log_softmax(logits), abs=1e-4)


@given(tables, tables)
def test_divergence_is_nonnegative_and_zero_to_itself(logits, other):
    p, q = log_softmax(logits), log_softmax(other)
    assert (kl_divergence(p, q) >= 0).all()
    assert kl_divergence(p, p) == pytest.approx(0)


def test_divergence_of_two_bernoulli_distributions():
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_top1_agreement_compares_argmax():
    assert top1_agreement(np.array([[1, 2], [2, 1]]), np.array([[0, 9], [0, 9]])).tolist() == [True, False]


def test_relative_error_is_relative_to_largest_logit():
    assert relative_error(np.array([[1.0, -4.0]]), np.array([[1.5, -4.0]])) == pytest.approx(0.125)


@pytest.mark.parametrize("nonfinite", [np.nan, np.inf, -np.inf])
def test_nonfinite_logits_are_rejected(nonfinite):
    with pytest.raises(MeasureError, match="must be finite"):
        log_softmax(np.array([[0.0, nonfinite]], dtype=np.float32))
