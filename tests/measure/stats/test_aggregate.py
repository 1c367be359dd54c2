from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import pytest

from edgeopt.core.result import Measurement
from edgeopt.errors import MeasureError
from edgeopt.measure.stats.aggregate import Run, judge_run, summarize_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    METRICS: ClassVar[Mapping[str, str]] = {"latency/lap_ms": "ms"}
    GROUP: ClassVar[str] = "laps"
    TIMING_SENSITIVE: ClassVar[bool] = True
    processes: int = 2
    unit: str = "ms"

    def collect(self, context: Any) -> dict[str, Any]:
        raise NotImplementedError

    def summarize(self, runs: Sequence[Mapping[str, Any]]) -> list[Measurement]:
        laps = [run["lap_ms"] for run in runs]
        return [
            Measurement(
                metric="latency/lap_ms",
                unit=self.unit,
                value=median(laps),
                low=min(laps),
                high=max(laps),
                count=len(laps),
                method="stopwatch",
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Untimed(Stopwatch):
    TIMING_SENSITIVE: ClassVar[bool] = False


def report(share: float, halves: Sequence[float], lap_ms: float, slowed: float) -> dict[str, Any]:
    section = {"elapsed_s": 1.0, "foreign_cpu_share": share}
    return {
        "sections": {"start": section, "watch": section},
        "samples": {"watch": {"lap_ms": lap_ms, "halves": list(halves), "slowed": slowed}},
    }


def run(
    share: float,
    halves: Sequence[float] = (1.0, 1.0),
    timed: Sequence[str] = ("watch",),
    lap_ms: float = 1.0,
    slowed: float = 0.0,
) -> Run:
    judged_report = report(share, halves, lap_ms, slowed)
    return judge_run("laps", judged_report, timed, foreign_cpu_share=0.05, halves_tolerance=0.25, slowed_share=0.5)


def summarize(probe: Stopwatch, runs: Sequence[Run], tolerance: float = 0.0) -> list[Measurement]:
    return summarize_runs("watch", probe, runs, foreign_cpu_share=tolerance)


def test_run_within_tolerances_is_undisturbed():
    assert run(0.05, (1.0, 1.25)).disturbance == ""


def test_foreign_load_above_limit_disturbs():
    assert "other processes used 6%" in run(0.06).disturbance


def test_unequal_halves_disturb_in_either_order():
    assert "halves of watch differ by 30%" in run(0, (1.3, 1.0)).disturbance
    assert "halves of watch differ by 30%" in run(0, (1.0, 1.3)).disturbance


def test_missing_halves_do_not_disturb():
    assert run(0, ()).disturbance == run(0, (5.0,)).disturbance == ""


def test_contention_above_limit_disturbs():
    assert run(0, slowed=0.5).disturbance == ""
    assert "contention for the physical cores slowed down 60% of watch" in run(0, slowed=0.6).disturbance


def test_load_does_not_disturb_untimed_probes():
    assert run(0.9, timed=()).disturbance == ""


def test_figures_use_undisturbed_runs_only():
    (figure,) = summarize(Stopwatch(), [run(0.5, lap_ms=9), run(0, lap_ms=1), run(0, lap_ms=2)])
    assert (figure.low, figure.high, figure.noisy) == (1, 2, False)


def test_disturbed_figure_is_noisy_and_covers_every_run():
    runs = [run(0.5, lap_ms=9), run(0.2, lap_ms=4), run(0, lap_ms=1), run(0.3, lap_ms=0.5)]
    (figure,) = summarize(Stopwatch(), runs)
    assert figure.noisy
    assert figure.value == 2.5, "median of the undisturbed run and the least disturbed one"
    assert (figure.low, figure.high) == (0.5, 9)
    assert "disturbed" in figure.method


def test_tolerated_load_widens_the_interval():
    (figure,) = summarize(Stopwatch(), [run(0, lap_ms=100), run(0, lap_ms=120)], tolerance=0.05)
    assert (figure.value, figure.low, figure.high) == (110, pytest.approx(95), pytest.approx(126))


def test_load_leaves_untimed_figures_unmarked():
    (figure,) = summarize(Untimed(), [run(0.9, lap_ms=3), run(0.9, lap_ms=5), run(0, lap_ms=9)])
    assert (figure.low, figure.high, figure.noisy) == (3, 5, False)


def test_undeclared_metric_is_rejected():
    with pytest.raises(MeasureError, match="METRICS"):
        summarize(Stopwatch(unit="s"), [run(0), run(0)])
