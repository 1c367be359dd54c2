from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.errors import ConfigError
from edgeopt.search.pareto.front import Objective, dominates, pareto_ranks

coordinates = st.integers(-3, 3).map(float) | st.floats(-5, 5)
point_sets = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[coordinates] * n), max_size=14))


def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and not any(x > y for x, y in zip(a, b, strict=True))


def brute_force(points: list[tuple[float, ...]]) -> list[int]:
    """Return the length of the longest chain of dominating points that ends in each point."""

    @cache
    def depth(n: int) -> int:
        return 1 + max((depth(m) for m in range(len(points)) if beats(points[m], points[n])), default=0)

    return [depth(n) for n in range(len(points))]


@given(points=point_sets)
def test_ranks_equal_brute_force(points: list[tuple[float, ...]]) -> None:
    assert pareto_ranks(points) == brute_force(points)


@given(points=point_sets)
def test_front_members_do_not_dominate_each_other(points: list[tuple[float, ...]]) -> None:
    front = [p for p, rank in zip(points, pareto_ranks(points), strict=True) if rank == 1]
    assert bool(front) == bool(points)
    assert not any(dominates(a, b) for a in front for b in front)


@given(a=st.tuples(coordinates, coordinates), b=st.tuples(coordinates, coordinates))
def test_dominance_is_strict_and_asymmetric(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    assert not dominates(a, a)
    assert not (dominates(a, b) and dominates(b, a))
    assert dominates(a, b) == beats(a, b)


def test_equal_points_share_a_rank() -> None:
    assert pareto_ranks([(1.0, 2.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0)]) == [1, 1, 1, 2]


def test_invalid_objective_is_rejected() -> None:
    assert Objective.parse("m", "maximize", {"m": ""}).sign == -1.0
    with pytest.raises(ConfigError, match=r"search.objectives.x: unknown metric 'x'.*m"):
        Objective.parse("x", "minimize", {"m": ""})
    with pytest.raises(ConfigError, match=r"direction must be minimize or maximize, got 'min'"):
        Objective.parse("m", "min", {"m": ""})
