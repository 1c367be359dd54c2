from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from edgeopt.search.pareto.hypervolume import HypervolumeTracker, hypervolume, trials_without_growth

coordinates = st.integers(0, 6).map(float) | st.floats(-3, 3)
point_sets = st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[coordinates] * n), min_size=1, max_size=9))


@given(points=point_sets, reference=st.floats(0, 4))
def test_hypervolume_equals_optuna(points: list[tuple[float, ...]], reference: float) -> None:
    corner = [reference] * len(points[0])
    inside = [p for p in points if all(x <= reference for x in p)]
    expected = compute_hypervolume(np.array(inside), np.array(corner)) if inside else 0.0
    assert hypervolume(points, corner) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_equals_monte_carlo_estimate(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    points, targets = rng.random((12, objectives)), rng.random((100_000, objectives))
    share = (points[None] <= targets[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(points.tolist(), [1.0] * objectives) == pytest.approx(share, abs=4 * 0.5 / 100_000**0.5)


def test_points_beyond_the_reference_dominate_nothing() -> None:
    assert hypervolume([], (1.0, 1.0)) == 0.0
    assert hypervolume([(1.0, 0.0), (0.0, 1.0), (2.0, -5.0)], (1.0, 1.0)) == 0.0


@given(points=point_sets)
def test_tracked_hypervolume_is_independent_of_order(points: list[tuple[float, ...]]) -> None:
    reference = [4.0] * len(points[0])
    tracker, reversed_tracker = HypervolumeTracker(reference), HypervolumeTracker(reference)
    volumes = [0.0, *(tracker.add(p) for p in points)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(volumes))
    assert volumes[-1] <= 1 + 1e-12
    for point in reversed(points):
        reversed_tracker.add(point)
    assert reversed_tracker.volume == pytest.approx(tracker.volume, rel=1e-9)
    assert tracker.add(points[0]) == tracker.volume, "a repeated point adds nothing"


def test_tracked_hypervolume_is_relative_to_the_reference() -> None:
    tracker = HypervolumeTracker([10.0, 2.0])
    assert [tracker.add((5.0, 1.0)), tracker.add((10.0, 0.0)), tracker.add((0.0, 1.5))] == pytest.approx(
        [0.25, 0.25, 0.375]
    )


def test_negative_values_count_as_zero() -> None:
    assert HypervolumeTracker([1.0, 1.0]).add((-5.0, 0.5)) == pytest.approx(0.5)


def test_hypervolume_is_independent_of_scale() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    tracker, scaled = HypervolumeTracker([6.0, 6.0]), HypervolumeTracker([6e6, 6e-6])
    assert [tracker.add(p) for p in points] == pytest.approx([scaled.add((x * 1e6, y * 1e-6)) for x, y in points])


@given(steps=st.lists(st.sampled_from([0.0, 1e-4, 9e-4, 2e-3, 0.5]), max_size=12), start=st.sampled_from([0.0, 0.1]))
def test_trials_without_growth_are_counted(steps: list[float], start: float) -> None:
    volumes = [start * np.prod([1 + step for step in steps[:n]], initial=1.0) for n in range(1, len(steps) + 1)]
    counted = 0
    for n in range(1, len(volumes)):
        if volumes[-1] <= volumes[-1 - n] * 1.001:
            counted = n
    assert trials_without_growth(volumes) == counted
