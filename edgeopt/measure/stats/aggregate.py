"""Turn the reports of measured processes into measurements and mark disturbed runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeopt.core.protocols import Probe, Samples
from edgeopt.core.result import Measurement
from edgeopt.errors import MeasureError

HALVES = "halves"
"""Optional key of a timed probe's samples: two measurements of the same work, done one after the other."""
SLOWED = "slowed"
"""Optional key of a timed probe's samples: share of the work that contention for the physical cores slowed down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Report of one measured process.

    Attributes:
        disturbance: the reasons why the timed measurements are unreliable; empty for an undisturbed run.
        foreign_cpu_share: share of the CPU capacity that other processes used during the timed sections.
    """

    group: str
    disturbance: str
    foreign_cpu_share: float
    report: Mapping[str, Any]

    @property
    def samples(self) -> Mapping[str, Samples]:
        """Return the samples by name of the probe."""
        samples: Mapping[str, Samples] = self.report["samples"]
        return samples


def judge_run(
    group: str,
    report: Mapping[str, Any],
    timed_probes: Iterable[str],
    *,
    foreign_cpu_share: float,
    halves_tolerance: float,
    slowed_share: float,
) -> Run:
    """Build the run of a report and list the reasons why its timed measurements are disturbed.

    A run is disturbed in three cases: other processes used more than `foreign_cpu_share` of the cores while
    `timed_probes` collected, the two halves of a probe's work differ by more than `halves_tolerance` of the smaller,
    or contention slowed down more than `slowed_share` of the work.
    """
    names = list(timed_probes)
    sections = [report["sections"][name] for name in ("start", *names)]
    total_s = sum(section["elapsed_s"] for section in sections)
    foreign_share = sum(section["foreign_cpu_share"] * section["elapsed_s"] for section in sections) / total_s
    reasons = []
    if names and foreign_share > foreign_cpu_share:
        reasons.append(f"other processes used {foreign_share:.0%} of the cores")
    for name in names:
        halves = report["samples"][name].get(HALVES, ())
        if len(halves) == 2 and max(halves) > (1 + halves_tolerance) * min(halves):
            reasons.append(f"the halves of {name} differ by {max(halves) / min(halves) - 1:.0%}")
        slowed = report["samples"][name].get(SLOWED, 0.0)
        if slowed > slowed_share:
            reasons.append(f"contention for the physical cores slowed down {slowed:.0%} of {name}")
    return Run(group=group, disturbance=" and ".join(reasons), foreign_cpu_share=foreign_share, report=report)


def select_undisturbed_runs(runs: Sequence[Run], probe_name: str) -> list[Run]:
    """Return the undisturbed runs in which the probe collected."""
    return [run for run in runs if probe_name in run.samples and not run.disturbance]


def summarize_runs(
    probe_name: str, probe: Probe, runs: Sequence[Run], *, foreign_cpu_share: float
) -> list[Measurement]:
    """Compute the measurements of one probe from the runs in which it collected.

    A timed probe uses undisturbed runs. Its intervals grow by `foreign_cpu_share`, the foreign load that an
    undisturbed run may contain. If there are too few undisturbed runs, the least disturbed ones complete them, the
    measurements are marked noisy, and each interval grows to contain the measurement of every single run.

    Raises MeasureError if the probe reports a metric or unit that its METRICS do not declare.
    """
    collected = [run for run in runs if probe_name in run.samples]
    if not probe.TIMING_SENSITIVE:
        return _summarize(probe_name, probe, collected[: probe.processes])
    ranked = sorted(collected, key=lambda run: (bool(run.disturbance), run.foreign_cpu_share))
    measurements = [
        _add_tolerance(measurement, foreign_cpu_share)
        for measurement in _summarize(probe_name, probe, ranked[: probe.processes])
    ]
    if len(select_undisturbed_runs(collected, probe_name)) >= probe.processes:
        return measurements
    by_run = [measurement for run in collected for measurement in _summarize(probe_name, probe, [run])]
    return [
        _mark_noisy(measurement, [f for f in by_run if f.metric == measurement.metric]) for measurement in measurements
    ]


def _summarize(probe_name: str, probe: Probe, runs: Sequence[Run]) -> list[Measurement]:
    measurements = probe.summarize([run.samples[probe_name] for run in runs])
    for measurement in measurements:
        if probe.METRICS.get(measurement.metric) != measurement.unit:
            raise MeasureError(
                f"probe {probe_name!r} must declare every metric in METRICS, "
                f"got {measurement.metric!r} in {measurement.unit!r}",
                hint="Add the metric and its unit to METRICS",
            )
    return measurements


def _add_tolerance(measurement: Measurement, share: float) -> Measurement:
    """Widen the interval by a share of its ends: load below the threshold varies between sessions, not within one."""
    method = f"{measurement.method}; ± {share:.0%} for tolerated load of other processes"
    return replace(
        measurement, low=max(0.0, measurement.low * (1 - share)), high=measurement.high * (1 + share), method=method
    )


def _mark_noisy(measurement: Measurement, by_run: Sequence[Measurement]) -> Measurement:
    """Mark a measurement as noisy and extend its interval to those of all single runs."""
    low = min(measurement.low, *(single.low for single in by_run))
    high = max(measurement.high, *(single.high for single in by_run))
    method = f"{measurement.method}; disturbed, so the interval covers every run"
    return replace(measurement, low=low, high=high, method=method, noisy=True)
