from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.errors import ConfigError
from edgeopt.result import Failure, TrialResult
from edgeopt.search.front import Objective, dominates, pareto_ranks, ranked, row

coordinates = st.integers(-3, 3).map(float) | st.floats(-5, 5)
clouds = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[coordinates] * n), max_size=14))
DECODE, RATIO = Objective(metric="latency/decode_p50_ms"), Objective(metric="quality/perplexity_ratio")


def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and not any(x > y for x, y in zip(a, b, strict=True))


def brute_force(points: list[tuple[float, ...]]) -> list[int]:
    """Points in the longest chain, each beating the next, that ends in the point."""

    @cache
    def depth(n: int) -> int:
        return 1 + max((depth(m) for m in range(len(points)) if beats(points[m], points[n])), default=0)

    return [depth(n) for n in range(len(points))]


@given(points=clouds)
def test_ranks_are_those_of_the_definition(points: list[tuple[float, ...]]) -> None:
    assert pareto_ranks(points) == brute_force(points)


@given(points=clouds)
def test_the_front_is_never_empty_and_its_members_do_not_dominate_one_another(points: list[tuple[float, ...]]) -> None:
    front = [p for p, rank in zip(points, pareto_ranks(points), strict=True) if rank == 1]
    assert bool(front) == bool(points)
    assert not any(dominates(a, b) for a in front for b in front)


@given(a=st.tuples(coordinates, coordinates), b=st.tuples(coordinates, coordinates))
def test_dominance_is_strict_and_of_one_side(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    assert not dominates(a, a)
    assert not (dominates(a, b) and dominates(b, a))
    assert dominates(a, b) == beats(a, b)


def test_equal_points_share_a_rank() -> None:
    assert pareto_ranks([(1.0, 2.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0)]) == [1, 1, 1, 2]


def outcome(decode_ms: float, ratio: float = 1.0, **more: Any) -> TrialResult:
    return samples.result(decode_ms=decode_ms, ratio=ratio, **more)


def test_only_feasible_trials_are_ranked() -> None:
    results = {
        3: outcome(0.5),
        5: outcome(0.6),
        7: outcome(0.1, ratio=2.0),  # above its limit
        9: outcome(0.1, failure=Failure(stage="build", kind="BuildError", message="m")),
    }
    assert ranked(results, (DECODE, RATIO)) == {3: 1, 5: 2}


def test_a_maximized_metric_is_better_when_it_is_larger() -> None:
    results = {0: outcome(0.5), 1: outcome(0.6)}
    assert ranked(results, (Objective(metric=DECODE.metric, direction="maximize"),)) == {0: 2, 1: 1}


def test_a_trial_without_an_objective_is_not_ranked() -> None:
    assert ranked({0: outcome(0.5)}, (DECODE, Objective(metric="energy/j_per_token"))) == {}


def test_a_figure_that_is_no_number_is_not_on_the_front() -> None:
    broken = outcome(0.5)
    figures = [replace(m, value=math.nan) if m.metric == "size/engine_mib" else m for m in broken.measurements]
    broken = replace(broken, measurements=tuple(figures))
    assert ranked({0: broken, 1: outcome(0.6)}, (Objective(metric="size/engine_mib"),)) == {1: 1}


def test_objectives_are_checked_against_known_metrics() -> None:
    assert Objective.parse("m", "maximize", {"m": ""}).sign == -1.0
    with pytest.raises(ConfigError, match=r"search.objectives.x: unknown metric 'x'.*m"):
        Objective.parse("x", "minimize", {"m": ""})
    with pytest.raises(ConfigError, match=r"'min' is no direction"):
        Objective.parse("m", "min", {"m": ""})


def test_a_row_tells_of_a_failure_and_of_what_waits() -> None:
    failed = row(1, "failed", {"a": 1}, outcome(1.0, failure=Failure(stage="build", kind="E", message="m")), None, None)
    assert (failed["feasible"], failed["metrics"], failed["failure"]) == (False, {}, "build: m")
    waiting = row(2, "waiting", {}, None, None, None)
    assert (waiting["feasible"], waiting["excess"], waiting["failure"]) == (False, {}, None)
