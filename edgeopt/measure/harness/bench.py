"""Measure an engine: every probe in fresh processes, under the lease, repeated where something disturbed it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeopt.core.artifact import Engine
from edgeopt.core.config_objects import instantiate, to_config
from edgeopt.core.corpus import Text
from edgeopt.core.protocols import FILES, GENERATION, Probe, Progress, Runtime, SupportsAffinity
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine import device_lease, procfs
from edgeopt.measure.harness import child_process, samples
from edgeopt.measure.harness.child_process import Job
from edgeopt.measure.harness.spawn import spawn
from edgeopt.measure.harness.workload import PROMPT_LENGTHS, Workload, build_workload
from edgeopt.measure.stats.aggregate import Run, judge_run, summarize_runs, undisturbed_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Which probes run, on what workload, and when a measurement counts as disturbed.

    Attributes:
        probes: by name; None switches one off.
        prompt_lengths: tokens of the prompts whose time to first token is measured.
        window_tokens, max_windows: evaluation windows, spread evenly over the whole text.
        foreign_cpu_share: CPU capacity that other processes may use while figures are timed; timed
            intervals are widened by as much.
        halves_tolerance: how far the two halves of a timed run may differ, relative to the faster.
        slowed_share: how much of a timed run others on the same physical cores may slow down, where it shows.
        retries: fresh processes added at most to those of a group, in place of disturbed ones.
        timeout_s: for each process.
        adapter: with which engines that have adapters are measured; None: their base.
        stop_early: whether an evaluation ends at the first group of probes after which a limit is surely broken.
    """

    probes: Mapping[str, Any]
    prompt_lengths: tuple[int, ...] = (16, 64, 256)
    window_tokens: int = 512
    max_windows: int = 24
    foreign_cpu_share: float = 0.05
    halves_tolerance: float = 0.25
    slowed_share: float = 0.5
    retries: int = 2
    timeout_s: float = 600.0
    adapter: str | None = None
    stop_early: bool = True

    def __post_init__(self) -> None:
        parts = {name: _part(name, given) for name, given in self.probes.items() if given is not None}
        object.__setattr__(self, "probes", parts)
        announced = [metric for probe in parts.values() for metric in probe.METRICS]
        twice = sorted({metric for metric in announced if announced.count(metric) > 1})
        if twice:
            raise ConfigError(f"two probes measure {twice[0]}", location="probes", hint="Switch one of them off")
        if not self.prompt_lengths or not set(self.prompt_lengths) <= set(PROMPT_LENGTHS):
            raise ConfigError(
                f"{list(self.prompt_lengths)} names no prompt length, or one without a metric",
                location="prompt_lengths",
                hint=f"Choose among: {', '.join(map(str, PROMPT_LENGTHS))}",
            )
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{getattr(self, name)!r} is too little", location=name, hint=f"Give {least} or more")

    @property
    def metrics(self) -> dict[str, str]:
        """Every metric that the active probes may report, with its unit."""
        return {metric: unit for probe in self.probes.values() for metric, unit in probe.METRICS.items()}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Names of the active probes by group, in the order in which they are measured.

        Files come first, which cost nothing, and what is timed alone comes last. Inside a group timed probes collect
        last, so that what they do is not in the others' memory.
        """
        groups: dict[str, tuple[str, ...]] = {}
        for name, probe in sorted(self.probes.items(), key=lambda item: (item[1].GROUP != FILES, item[1].TIMED)):
            groups[probe.GROUP] = (*groups.get(probe.GROUP, ()), name)
        return groups

    def select_probes(self, names: Sequence[str]) -> Bench:
        """The bench with those of its probes that `names` has."""
        return replace(self, probes={name: probe for name, probe in self.probes.items() if name in names})


_LEAST = {
    "window_tokens": 16,
    "max_windows": 1,
    "foreign_cpu_share": 0,
    "halves_tolerance": 0,
    "slowed_share": 0,
    "retries": 0,
    "timeout_s": 1,
}


def _part(name: str, given: Any) -> Any:
    location = f"measure.probes.{name}"
    part = instantiate(given, location) if isinstance(given, Mapping) else given
    if not hasattr(part, "METRICS"):
        raise ConfigError(f"{type(part).__name__} is no probe", location=location, hint="Name a class with METRICS")
    return part


def measure(
    engine: Engine,
    runtime: Runtime,
    bench: Bench,
    target: Target,
    evaluation: Text,
    directory: Path,
    references: Mapping[str, Path],
    progress: Progress,
    *,
    isolated: bool = True,
) -> tuple[Measurement, ...]:
    """What every probe of `bench` finds out about `engine`, pinned to the target's threads.

    Probes collect in fresh processes; without `fresh` in this one, where a reference is to be kept and nothing timed.

    In `directory` stay `samples.json` with the raw samples of every process, `logs/`, and `scratch/`,
    which may serve as a reference (`baseline`, `checkpoint`) when other engines are measured.
    Raises MeasureError where a process fails, InputError where the evaluation text is too short.
    """
    groups = bench.groups
    context_length = min(target.context_length, engine.spec.context_length)
    workload = Workload(context_length=context_length, prompts={}, documents=[], left_out=())
    held: AbstractContextManager[None] = nullcontext()
    if groups.keys() - {FILES}:
        held = device_lease.exclusive(progress) if isolated else device_lease.shared(progress)
        workload = build_workload(
            evaluation,
            engine.directory,
            context_length=context_length,
            prompt_lengths=bench.prompt_lengths,
            window_tokens=bench.window_tokens,
            max_windows=bench.max_windows,
        )
    try:
        for folder in ("scratch", samples.LOGS):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="edgeopt-") as work:
            documents = Path(work) / "documents.json"
            documents.write_text(json.dumps(workload.documents))
            job = Job(
                parent=os.getpid(),
                runtime=to_config(runtime),
                probes={},
                engine=str(engine.directory.absolute()),
                cores=_cores(runtime, target),
                context_length=workload.context_length,
                prompts={str(length): ids for length, ids in workload.prompts.items()},
                documents=str(documents),
                references={name: str(_existing(name, folder)) for name, folder in references.items()},
                scratch=str((directory / "scratch").absolute()),
                report=str(Path(work) / "report.json"),
                adapter=bench.adapter,
                memory_cap_bytes=target.memory_cap_bytes,
            )
            with held:
                runs = [
                    run
                    for group, names in groups.items()
                    for run in _run_group(
                        group, {n: bench.probes[n] for n in names}, bench, job, directory, progress, isolated=isolated
                    )
                ]
        record = {
            "engine": engine.digest,
            "target": target.name,
            "cores": job.cores,
            "context_length": workload.context_length,
            "windows": len(workload.documents),
            "prompt_lengths_left_out": workload.left_out,
            "runs": [asdict(run) for run in runs],
        }
        samples.write(record, directory)
    except OSError as error:
        raise MeasureError(
            f"the measurement cannot be kept ({error})", location=str(directory), hint="Free or unlock the disk"
        ) from error
    return tuple(
        figure
        for name, probe in bench.probes.items()
        for figure in summarize_runs(name, probe, runs, foreign_cpu_share=bench.foreign_cpu_share)
    )


def _cores(runtime: Runtime, target: Target) -> list[int]:
    """Where measured processes are kept: on the processors that the runtime chooses, or the first of those allowed."""
    cores = procfs.pinned_cores(target.threads)
    chosen = runtime.processors(len(cores)) if isinstance(runtime, SupportsAffinity) else ()
    return list(chosen) or cores


def _existing(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise MeasureError(f"the reference {name!r} is absent", location=str(folder), hint="Measure it first")
    return folder.absolute()


def _run_group(
    group: str,
    probes: Mapping[str, Probe],
    bench: Bench,
    job: Job,
    directory: Path,
    progress: Progress,
    *,
    isolated: bool,
) -> list[Run]:
    """As many fresh processes as the probes ask for, and others where timed ones were disturbed."""
    if group == FILES:
        report = child_process.collect_from_files(
            replace(job, probes={name: to_config(probe) for name, probe in probes.items()})
        )
        return [Run(group=group, disturbance="", foreign_cpu_share=0.0, report=report)]
    timed = {name: probe for name, probe in probes.items() if probe.TIMED}
    runs: list[Run] = []

    def run(asked: Mapping[str, Probe], what: str) -> None:
        progress(f"measuring {', '.join(asked)}: {what}")
        doing = replace(
            job,
            probes={name: to_config(probe) for name, probe in asked.items()},
            memory_cap_bytes=job.memory_cap_bytes if group == GENERATION else 0,
        )
        log = directory / samples.LOGS / f"{group}-{len(runs)}.log"
        report = (
            spawn(doing, log, bench.timeout_s, progress) if isolated else child_process.run(doing, time.monotonic())
        )
        runs.append(
            judge_run(
                group,
                report,
                timed.keys() & asked.keys(),
                foreign_cpu_share=bench.foreign_cpu_share,
                halves_tolerance=bench.halves_tolerance,
                slowed_share=bench.slowed_share,
            )
        )

    count = max(probe.processes for probe in probes.values())
    for number in range(count):
        run({n: p for n, p in probes.items() if p.processes > number}, f"process {number + 1} of {count}")
    for retry in range(bench.retries):
        if all(len(undisturbed_runs(runs, name)) >= probe.processes for name, probe in timed.items()):
            break
        reason = next(r.disturbance for r in reversed(runs) if r.disturbance)
        run(timed, f"repeated because {reason} ({retry + 1} of {bench.retries})")
    return runs
