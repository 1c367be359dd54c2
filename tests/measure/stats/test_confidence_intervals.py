from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.measure.stats.confidence_intervals import (
    bootstrap_clusters,
    bootstrap_processes,
    bootstrap_ratio,
    expected_shortfall,
    median,
)

finite = st.floats(-1e6, 1e6)


def test_single_sample_has_zero_width():
    assert bootstrap_processes([[3.5]], median) == (3.5, 3.5, 3.5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=6))
def test_interval_contains_value_and_process_medians(runs):
    value, low, high = bootstrap_processes(runs, median)
    assert value == np.median(np.concatenate([np.asarray(r) for r in runs]))
    assert low <= value <= high
    assert all(low <= np.median(run) <= high for run in runs)


def test_intervals_are_deterministic():
    runs = np.random.default_rng(5).normal(size=(5, 40)).tolist()
    assert bootstrap_processes(runs, median) == bootstrap_processes(runs, median)


@pytest.mark.parametrize("processes", [3, 5])
def test_interval_covers_true_median_95_percent(processes):
    generator = np.random.default_rng(7)
    hits, rounds = 0, 200
    for _ in range(rounds):
        runs = generator.normal(size=(processes, 1)) + 0.5 * generator.normal(size=(processes, 20))
        _, low, high = bootstrap_processes(runs.tolist(), median)
        hits += low <= 0 <= high
    assert hits / rounds >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / rounds), (
        "three standard errors of the simulated coverage"
    )


def test_mean_interval_matches_normal_approximation():
    samples = np.random.default_rng(3).normal(10, 2, size=900)
    value, low, high = bootstrap_ratio(samples.tolist(), [1] * 900)
    margin = 1.96 * samples.std(ddof=1) / math.sqrt(900)
    assert value == pytest.approx(samples.mean())
    assert (high - low) / 2 == pytest.approx(margin, rel=0.1)


def test_ratio_weights_windows_by_tokens():
    value, _, _ = bootstrap_ratio([10.0, 1.0], [5, 1])
    assert value == pytest.approx(11 / 6)


def test_equal_windows_have_zero_width():
    assert bootstrap_ratio([0.0] * 8, [100] * 8) == (0.0, 0.0, 0.0)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(finite, min_size=1, max_size=5), min_size=1, max_size=6))
def test_clusters_of_any_size_are_pooled(clusters):
    value, low, high = bootstrap_clusters(clusters, lambda samples: np.percentile(samples, 99))
    assert value == np.percentile(np.concatenate([np.asarray(c) for c in clusters]), 99)
    assert low <= value <= high


def test_correlated_clusters_widen_the_interval():
    independent = [[float(i)] for i in range(50) for _ in range(4)]
    clustered = [[float(i)] * 4 for i in range(50)]
    _, low, high = bootstrap_clusters(independent, np.mean)
    _, wide_low, wide_high = bootstrap_clusters(clustered, np.mean)
    assert wide_high - wide_low > 1.5 * (high - low)


def test_three_samples_get_student_interval():
    _, low, high = bootstrap_processes([[9.0], [10.0], [11.0]], median)
    assert (low, high) == (pytest.approx(10 - 4.303 / math.sqrt(3)), pytest.approx(10 + 4.303 / math.sqrt(3)))


def test_nonnegative_samples_have_nonnegative_bound():
    assert bootstrap_processes([[0.0], [1.0]], median)[1] == 0


@given(st.lists(finite, min_size=1, max_size=60), st.sampled_from([50.0, 90.0, 99.0]))
def test_expected_shortfall_is_mean_of_largest(samples, percent):
    count = max(1, round(len(samples) * (100 - percent) / 100))
    largest = sorted(samples, reverse=True)[:count]
    assert expected_shortfall(percent)(np.asarray(samples)) == pytest.approx(math.fsum(largest) / count, abs=1e-6)


def test_expected_shortfall_uses_last_axis():
    samples = np.random.default_rng(0).normal(size=(3, 40))
    tail_mean = expected_shortfall(90)
    assert tail_mean(samples).tolist() == [tail_mean(row) for row in samples]
