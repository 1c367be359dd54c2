"""From what single processes reported to figures: which runs count, and what disturbance does to a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeopt.core.protocols import Probe, Samples
from edgeopt.core.result import Measurement
from edgeopt.errors import MeasureError

HALVES = "halves"
"""Key under which a timed probe's samples may give two figures of the same work, done one after the other."""
SLOWED = "slowed"
"""Key under which they may give the share of it that others on the same physical cores slowed down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process reported; `disturbance` says what spoiled its timed figures, if anything did."""

    group: str
    disturbance: str
    foreign_cpu_share: float
    report: Mapping[str, Any]

    @property
    def samples(self) -> Mapping[str, Samples]:
        samples: Mapping[str, Samples] = self.report["samples"]
        return samples


def judge_run(
    group: str,
    report: Mapping[str, Any],
    timed: Iterable[str],
    *,
    foreign_cpu_share: float,
    halves_tolerance: float,
    slowed_share: float,
) -> Run:
    """The run of a report, disturbed where other processes took more than `foreign_cpu_share` of the
    cores while the probes `timed` collected, where two halves of their work differ by more than
    `halves_tolerance` of the smaller, or where neighbours slowed down more than `slowed_share` of it."""
    names = list(timed)
    sections = [report["sections"][name] for name in ("start", *names)]
    whole_s = sum(section["elapsed_s"] for section in sections)
    share = sum(section["foreign_cpu_share"] * section["elapsed_s"] for section in sections) / whole_s
    reasons = []
    if names and share > foreign_cpu_share:
        reasons.append(f"other processes took {share:.0%} of the cores")
    for name in names:
        halves = report["samples"][name].get(HALVES, ())
        if len(halves) == 2 and max(halves) > (1 + halves_tolerance) * min(halves):
            reasons.append(f"the halves of {name} differ by {max(halves) / min(halves) - 1:.0%}")
        slowed = report["samples"][name].get(SLOWED, 0.0)
        if slowed > slowed_share:
            reasons.append(f"others on the same physical cores slowed down {slowed:.0%} of {name}")
    return Run(group=group, disturbance=" and ".join(reasons), foreign_cpu_share=share, report=report)


def undisturbed_runs(runs: Sequence[Run], name: str) -> list[Run]:
    return [run for run in runs if name in run.samples and not run.disturbance]


def summarize_runs(name: str, probe: Probe, runs: Sequence[Run], *, foreign_cpu_share: float) -> list[Measurement]:
    """The figures of one probe from the runs that it collected in.

    A timed probe takes undisturbed runs, and its intervals grow by the share of foreign load that
    passes as undisturbed. Where such runs are too few, the least disturbed others join them, its
    figures are noisy, and each interval grows to hold what any single run would have given.
    """
    own = [run for run in runs if name in run.samples]
    if not probe.TIMED:
        return _summarized(name, probe, own[: probe.processes])
    ranked = sorted(own, key=lambda run: (bool(run.disturbance), run.foreign_cpu_share))
    figures = [_tolerant(f, foreign_cpu_share) for f in _summarized(name, probe, ranked[: probe.processes])]
    if len(undisturbed_runs(own, name)) >= probe.processes:
        return figures
    singles = [figure for run in own for figure in _summarized(name, probe, [run])]
    return [_widened(figure, [s for s in singles if s.metric == figure.metric]) for figure in figures]


def _summarized(name: str, probe: Probe, runs: Sequence[Run]) -> list[Measurement]:
    figures = probe.summarize([run.samples[name] for run in runs])
    for figure in figures:
        if probe.METRICS.get(figure.metric) != figure.unit:
            raise MeasureError(
                f"probe {name!r} reported {figure.metric!r} in {figure.unit!r}, which its METRICS do not announce",
                hint="Add the metric and its unit to METRICS",
            )
    return figures


def _tolerant(figure: Measurement, share: float) -> Measurement:
    """Two sessions differ by load below the threshold, which the spread within one cannot show."""
    method = f"{figure.method}; ± {share:.0%} for load that passes as undisturbed"
    return replace(figure, low=max(0.0, figure.low * (1 - share)), high=figure.high * (1 + share), method=method)


def _widened(figure: Measurement, singles: Sequence[Measurement]) -> Measurement:
    low = min(figure.low, *(single.low for single in singles))
    high = max(figure.high, *(single.high for single in singles))
    method = f"{figure.method}; disturbed, so the interval holds every run"
    return replace(figure, low=low, high=high, method=method, noisy=True)
