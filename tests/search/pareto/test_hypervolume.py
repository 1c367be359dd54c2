from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from edgeopt.search.pareto.hypervolume import HypervolumeTracker, hypervolume, trials_without_growth

coordinates = st.integers(0, 6).map(float) | st.floats(-3, 3)
clouds = st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[coordinates] * n), min_size=1, max_size=9))


@given(points=clouds, reference=st.floats(0, 4))
def test_the_volume_is_that_of_another_algorithm(points: list[tuple[float, ...]], reference: float) -> None:
    corner = [reference] * len(points[0])
    inside = [p for p in points if all(x <= reference for x in p)]
    expected = compute_hypervolume(np.array(inside), np.array(corner)) if inside else 0.0
    assert hypervolume(points, corner) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_volume_is_the_share_of_random_points_that_are_dominated(objectives: int) -> None:
    draw = np.random.default_rng(objectives)
    points, thrown = draw.random((12, objectives)), draw.random((100_000, objectives))
    hit = (points[None] <= thrown[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(points.tolist(), [1.0] * objectives) == pytest.approx(hit, abs=4 * 0.5 / 100_000**0.5)


def test_a_point_at_the_reference_or_beyond_dominates_nothing() -> None:
    assert hypervolume([], (1.0, 1.0)) == 0.0
    assert hypervolume([(1.0, 0.0), (0.0, 1.0), (2.0, -5.0)], (1.0, 1.0)) == 0.0


@given(points=clouds)
def test_an_archive_grows_from_0_to_1_whatever_the_order(points: list[tuple[float, ...]]) -> None:
    reference = [4.0] * len(points[0])
    archive, other = HypervolumeTracker(reference), HypervolumeTracker(reference)
    volumes = [0.0, *(archive.add(p) for p in points)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(volumes))
    assert volumes[-1] <= 1 + 1e-12
    for point in reversed(points):
        other.add(point)
    assert other.volume == pytest.approx(archive.volume, rel=1e-9)
    assert archive.add(points[0]) == archive.volume, "a point that is known adds nothing"


def test_an_archive_counts_shares_of_the_worst_that_counts() -> None:
    archive = HypervolumeTracker([10.0, 2.0])
    assert [archive.add((5.0, 1.0)), archive.add((10.0, 0.0)), archive.add((0.0, 1.5))] == pytest.approx(
        [0.25, 0.25, 0.375]
    )


def test_nothing_is_better_than_nothing_at_all() -> None:
    assert HypervolumeTracker([1.0, 1.0]).add((-5.0, 0.5)) == pytest.approx(0.5)


def test_the_scale_of_an_objective_does_not_matter() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    one, other = HypervolumeTracker([6.0, 6.0]), HypervolumeTracker([6e6, 6e-6])
    assert [one.add(p) for p in points] == pytest.approx([other.add((x * 1e6, y * 1e-6)) for x, y in points])


@given(steps=st.lists(st.sampled_from([0.0, 1e-4, 9e-4, 2e-3, 0.5]), max_size=12), start=st.sampled_from([0.0, 0.1]))
def test_trials_without_growth_are_counted_from_the_end(steps: list[float], start: float) -> None:
    volumes = [start * np.prod([1 + step for step in steps[:n]], initial=1.0) for n in range(1, len(steps) + 1)]
    counted = 0
    for n in range(1, len(volumes)):
        if volumes[-1] <= volumes[-1 - n] * 1.001:
            counted = n
    assert trials_without_growth(volumes) == counted
