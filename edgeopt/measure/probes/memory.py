"""Measure the memory of a process that serves the engine at the full context length of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgeopt.core import units
from edgeopt.core.protocols import GENERATION_GROUP, DistributedSession, ProbeContext, Samples
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError
from edgeopt.machine import procfs
from edgeopt.measure.harness.workload import repeat_to_length
from edgeopt.measure.stats.confidence_intervals import bootstrap_processes, maximum, median

# Linux updates the peak in batches of 64 pages, and the load addresses of libraries change RSS by a similar amount
_RESOLUTION_MIB = 0.25
_PEAK, _CAP = "memory/peak_rss_mib", "memory/cap_mib"
_MAXIMUMS = (_PEAK, _CAP)
"""Metrics aggregated by the maximum over processes; the others use the median."""
# metric -> (key of its sample, instrument)
_INSTRUMENTS = {
    _PEAK: ("peak_rss_bytes", "VmHWM after {served} prompt and generated tokens"),
    "memory/steady_rss_mib": ("steady_rss_bytes", "Rss in smaps_rollup after loading, before the first token"),
    "memory/private_mib": ("private_bytes", "private pages in smaps_rollup after loading"),
    "memory/shared_mib": ("shared_bytes", "shared pages in smaps_rollup after loading"),
    "memory/pss_mib": ("pss_bytes", "Pss in smaps_rollup after loading"),
    "memory/huge_pages_mib": ("huge_bytes", "AnonHugePages in smaps_rollup after {served} prompt and generated tokens"),
    "memory/bare_rss_mib": ("bare_rss_bytes", "Rss in smaps_rollup before importing the runtime"),
    "memory/major_faults": ("major_faults", "ru_majflt after {served} prompt and generated tokens"),
    "memory/minor_faults_per_token": ("minor_faults_per_token", "ru_minflt while decoding {decoded} tokens"),
    "memory/major_faults_per_token": ("major_faults_per_token", "ru_majflt while decoding {decoded} tokens"),
    _CAP: ("cap_bytes", "lowest limit of the control groups of the process"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Probe of memory and page faults while generating after a prompt that fills the context.

    A long prompt is the worst case, because activations grow with the number of tokens processed at once.

    Attributes:
        processes: number of fresh processes.
        decode_tokens: tokens generated at the end of the context, 2 to 32.

    Raises ConfigError if a value is out of range.
    """

    METRICS: ClassVar[Mapping[str, str]] = {m: "MiB" if m.endswith("_mib") else "count" for m in _INSTRUMENTS}
    GROUP: ClassVar[str] = GENERATION_GROUP
    TIMING_SENSITIVE: ClassVar[bool] = False
    processes: int = 3
    decode_tokens: int = 16

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(
                f"`processes` must be at least 1, got {self.processes}", location="processes", hint="Use 1 or more"
            )
        if not 2 <= self.decode_tokens <= 32:
            raise ConfigError(
                f"`decode_tokens` must be between 2 and 32, got {self.decode_tokens}", location="decode_tokens"
            )

    def collect(self, context: ProbeContext) -> Samples:
        """Fill the context and return memory in bytes and page faults.

        Returns an empty mapping for a distributed session, whose memory is mostly in other processes.
        """
        if isinstance(context.session, DistributedSession):
            return {}
        longest = context.prompts[max(context.prompts)]
        prompt = repeat_to_length(longest, context.context_length - self.decode_tokens)
        generated = context.session.generate(prompt, self.decode_tokens, stop_at_end=False)
        next(generated)  # the first token includes the processing of the prompt
        before = procfs.count_page_faults()
        decoded = sum(1 for _ in generated)
        minor, major = procfs.count_page_faults()
        loaded, served = context.marks["loaded"], procfs.read_memory()
        return {
            "served_tokens": len(prompt) + 1 + decoded,
            "decoded_tokens": decoded,
            "peak_rss_bytes": served["peak_rss_bytes"],
            "huge_bytes": served["huge_bytes"],
            "major_faults": major,
            "minor_faults_per_token": (minor - before[0]) / decoded,
            "major_faults_per_token": (major - before[1]) / decoded,
            "bare_rss_bytes": context.marks["bare"]["rss_bytes"],
            "steady_rss_bytes": loaded["rss_bytes"],
            "private_bytes": loaded["private_bytes"],
            "shared_bytes": loaded["shared_bytes"],
            "pss_bytes": loaded["pss_bytes"],
            "wanted_cap_bytes": context.memory_cap_bytes,
            "cap_bytes": procfs.read_memory_cap(),
        }

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return the maximum over the processes of the peak and the cap, and the median of the other metrics.

        `memory/cap_mib` is reported only if every process has a cap.
        """
        if not all(runs):
            return []
        capped = all(run["cap_bytes"] is not None for run in runs)
        return [self._summarize_metric(metric, runs) for metric in self.METRICS if capped or metric != _CAP]

    def _summarize_metric(self, metric: str, runs: Sequence[Samples]) -> Measurement:
        key, instrument = _INSTRUMENTS[metric]
        use_maximum, in_mib = metric in _MAXIMUMS, self.METRICS[metric] == "MiB"
        values = [[run[key] / (2**20 if in_mib else 1)] for run in runs]
        value, low, high = bootstrap_processes(values, maximum if use_maximum else median)
        resolution = _RESOLUTION_MIB if in_mib and metric != _CAP else 0.0
        source = instrument.format(served=runs[0]["served_tokens"], decoded=runs[0]["decoded_tokens"])
        return Measurement(
            metric=metric,
            unit=self.METRICS[metric],
            value=value,
            low=max(0.0, low - resolution),
            high=high + resolution,
            count=len(runs),
            method=f"{source}; {'maximum' if use_maximum else 'median'} of {len(runs)} fresh processes"
            f"{_describe_cap(runs)}",
        )


def _describe_cap(runs: Sequence[Samples]) -> str:
    """Return a suffix that states if the kernel enforced the requested memory cap; empty without a cap."""
    requested = max(run["wanted_cap_bytes"] for run in runs)
    if not requested:
        return ""
    cap = units.format_quantity(requested / 2**20, "MiB")
    enforced = all(run["cap_bytes"] is not None and run["cap_bytes"] <= requested for run in runs)
    return f"; memory cap of {cap} enforced by the kernel" if enforced else f"; memory cap of {cap} not enforced"
