"""Memory of a process that serves the engine, up to the context length of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgeopt.core import units
from edgeopt.core.protocols import GENERATION, DistributedSession, Samples, Subject
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError
from edgeopt.machine import procfs
from edgeopt.measure.harness.workload import repeat_to_length
from edgeopt.measure.stats.confidence_intervals import bootstrap_processes, maximum, median

# Linux counts the peak in batches of 64 pages, and where libraries come to lie moves as many
_RESOLUTION_MIB = 0.25
_PEAK, _CAP = "memory/peak_rss_mib", "memory/cap_mib"
_GREATEST = (_PEAK, _CAP)
# metric -> its sample, the instrument
_FIGURES = {
    _PEAK: ("peak_rss_bytes", "VmHWM after {served} tokens of prompt and decode"),
    "memory/steady_rss_mib": ("steady_rss_bytes", "Rss of smaps_rollup after load, before the first token"),
    "memory/private_mib": ("private_bytes", "private pages of smaps_rollup after load"),
    "memory/shared_mib": ("shared_bytes", "shared pages of smaps_rollup after load"),
    "memory/pss_mib": ("pss_bytes", "Pss of smaps_rollup after load"),
    "memory/huge_pages_mib": ("huge_bytes", "AnonHugePages of smaps_rollup after {served} tokens of prompt and decode"),
    "memory/bare_rss_mib": ("bare_rss_bytes", "Rss of smaps_rollup before the runtime was imported"),
    "memory/major_faults": ("major_faults", "ru_majflt after {served} tokens of prompt and decode"),
    "memory/minor_faults_per_token": ("minor_faults_per_token", "ru_minflt while {decoded} tokens were decoded"),
    "memory/major_faults_per_token": ("major_faults_per_token", "ru_majflt while {decoded} tokens were decoded"),
    _CAP: ("cap_bytes", "least limit of the control groups of the process, which the kernel enforces"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """`decode_tokens` are generated after a prompt that fills the rest of the target's context.

    A long prompt is the worst case: activations grow with the tokens that are processed at once.
    """

    METRICS: ClassVar[Mapping[str, str]] = {m: "MiB" if m.endswith("_mib") else "count" for m in _FIGURES}
    GROUP: ClassVar[str] = GENERATION
    TIMED: ClassVar[bool] = False
    processes: int = 3
    decode_tokens: int = 16

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(
                f"{self.processes} processes measure nothing", location="processes", hint="Give 1 or more"
            )
        if not 2 <= self.decode_tokens <= 32:
            raise ConfigError(f"{self.decode_tokens} is not in 2 … 32", location="decode_tokens")

    def collect(self, subject: Subject) -> Samples:
        if isinstance(subject.session, DistributedSession):
            return {}
        longest = subject.prompts[max(subject.prompts)]
        prompt = repeat_to_length(longest, subject.context_length - self.decode_tokens)
        answer = subject.session.generate(prompt, self.decode_tokens, stop_at_end=False)
        next(answer)  # the prompt's
        before = procfs.count_page_faults()
        decoded = sum(1 for _ in answer)
        minor, major = procfs.count_page_faults()
        loaded, served = subject.marks["loaded"], procfs.read_memory()
        return {
            "served_tokens": len(prompt) + 1 + decoded,
            "decoded_tokens": decoded,
            "peak_rss_bytes": served["peak_rss_bytes"],
            "huge_bytes": served["huge_bytes"],
            "major_faults": major,
            "minor_faults_per_token": (minor - before[0]) / decoded,
            "major_faults_per_token": (major - before[1]) / decoded,
            "bare_rss_bytes": subject.marks["bare"]["rss_bytes"],
            "steady_rss_bytes": loaded["rss_bytes"],
            "private_bytes": loaded["private_bytes"],
            "shared_bytes": loaded["shared_bytes"],
            "pss_bytes": loaded["pss_bytes"],
            "wanted_cap_bytes": subject.memory_cap_bytes,
            "cap_bytes": procfs.read_memory_cap(),
        }

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        if not all(runs):
            return []
        capped = all(run["cap_bytes"] is not None for run in runs)
        return [self._over_processes(metric, runs) for metric in self.METRICS if capped or metric != _CAP]

    def _over_processes(self, metric: str, runs: Sequence[Samples]) -> Measurement:
        key, describe_instrument = _FIGURES[metric]
        greatest, mib = metric in _GREATEST, self.METRICS[metric] == "MiB"
        figures = [[run[key] / (2**20 if mib else 1)] for run in runs]
        value, low, high = bootstrap_processes(figures, maximum if greatest else median)
        resolution = _RESOLUTION_MIB if mib and metric != _CAP else 0.0
        how = describe_instrument.format(served=runs[0]["served_tokens"], decoded=runs[0]["decoded_tokens"])
        return Measurement(
            metric=metric,
            unit=self.METRICS[metric],
            value=value,
            low=max(0.0, low - resolution),
            high=high + resolution,
            count=len(runs),
            method=f"{how}; {'maximum' if greatest else 'median'} of {len(runs)} fresh processes{_condition(runs)}",
        )


def _condition(runs: Sequence[Samples]) -> str:
    """Under which cap the processes ran, where one was wanted."""
    wanted = max(run["wanted_cap_bytes"] for run in runs)
    if not wanted:
        return ""
    shown = units.show(wanted / 2**20, "MiB")
    enforced = all(run["cap_bytes"] is not None and run["cap_bytes"] <= wanted for run in runs)
    return (
        f"; under a cap of {shown} that the kernel enforced" if enforced else f"; the cap of {shown} was not enforced"
    )
