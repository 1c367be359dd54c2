"""Measure an engine with every probe in fresh processes, with exclusive use of the device. Repeat disturbed runs."""

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
from edgeopt.core.protocols import FILES_GROUP, GENERATION_GROUP, Probe, Progress, Runtime, SupportsAffinity
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine import device_lease, procfs
from edgeopt.measure.harness import child_process, samples
from edgeopt.measure.harness.child_process import Job
from edgeopt.measure.harness.spawn import spawn
from edgeopt.measure.harness.workload import PROMPT_LENGTHS, Workload, build_workload
from edgeopt.measure.stats.aggregate import Run, judge_run, select_undisturbed_runs, summarize_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Probes, workload, and the limits above which a timed run counts as disturbed.

    Attributes:
        probes: probe or probe config by name; None disables a probe.
        prompt_lengths: prompt lengths in tokens for which the time to first token is measured.
        window_tokens: largest number of tokens of an evaluation window.
        max_windows: largest number of evaluation windows, spread evenly over the text.
        foreign_cpu_share: share of the CPU capacity that other processes may use during a timed run; timed intervals
            are widened by the same share.
        halves_tolerance: largest difference between the two halves of a timed run, relative to the faster half.
        slowed_share: largest share of a timed run that contention for the physical cores may slow down. Contention is
            detected on virtual machines only.
        retries: largest number of additional processes per group, which replace disturbed ones.
        timeout_s: time limit of each process in seconds.
        adapter: adapter selected for engines with adapters; None measures the base model.
        stop_early: stop an evaluation after the first rung at which a limit is certainly violated.

    Raises ConfigError if two probes share a metric, a prompt length is not supported, or a value is out of range.
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
        probes = {name: _instantiate_probe(name, probe) for name, probe in self.probes.items() if probe is not None}
        object.__setattr__(self, "probes", probes)
        metrics = [metric for probe in probes.values() for metric in probe.METRICS]
        duplicates = sorted({metric for metric in metrics if metrics.count(metric) > 1})
        if duplicates:
            raise ConfigError(
                f"each metric must belong to one probe, got two probes for {duplicates[0]}",
                location="probes",
                hint="Disable one of them",
            )
        if not self.prompt_lengths or not set(self.prompt_lengths) <= set(PROMPT_LENGTHS):
            raise ConfigError(
                f"`prompt_lengths` must list supported lengths, got {list(self.prompt_lengths)}",
                location="prompt_lengths",
                hint=f"Choose from {', '.join(map(str, PROMPT_LENGTHS))}",
            )
        for name, minimum in _MINIMUMS.items():
            if not getattr(self, name) >= minimum:
                raise ConfigError(
                    f"`{name}` must be at least {minimum}, got {getattr(self, name)!r}",
                    location=name,
                    hint=f"Use {minimum} or more",
                )

    @property
    def metrics(self) -> dict[str, str]:
        """Return the unit of every metric that the active probes can report."""
        return {metric: unit for probe in self.probes.values() for metric, unit in probe.METRICS.items()}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the active probes by group, in the order of measurement.

        The group of file probes comes first, because it needs no process. Groups with only timed probes come last.
        Within a group, timed probes collect last, so that their allocations do not affect memory measurements.
        """
        groups: dict[str, tuple[str, ...]] = {}
        for name, probe in sorted(
            self.probes.items(), key=lambda item: (item[1].GROUP != FILES_GROUP, item[1].TIMING_SENSITIVE)
        ):
            groups[probe.GROUP] = (*groups.get(probe.GROUP, ()), name)
        return groups

    def select_probes(self, names: Sequence[str]) -> Bench:
        """Return a copy of the bench with only the named probes."""
        return replace(self, probes={name: probe for name, probe in self.probes.items() if name in names})


_MINIMUMS = {
    "window_tokens": 16,
    "max_windows": 1,
    "foreign_cpu_share": 0,
    "halves_tolerance": 0,
    "slowed_share": 0,
    "retries": 0,
    "timeout_s": 1,
}


def _instantiate_probe(name: str, probe: Any) -> Any:
    location = f"measure.probes.{name}"
    instance = instantiate(probe, location) if isinstance(probe, Mapping) else probe
    if not hasattr(instance, "METRICS"):
        raise ConfigError(
            f"`_target_` must be a probe, got {type(instance).__name__}",
            location=location,
            hint="Name a class that declares METRICS",
        )
    return instance


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
    """Measure `engine` with every probe of `bench`, pinned to as many cores as the target has threads.

    Each probe collects in fresh processes. With `isolated=False` it collects in the current process, which suffices for
    values that do not depend on timing.

    The function writes three files and folders to `directory`: `samples.json` with the raw samples of every process,
    `logs/`, and `scratch/`, which can be a reference (`baseline` or `checkpoint`) of later measurements.

    Raises:
        MeasureError: a process fails, a reference does not exist, or `directory` cannot be written.
        InputError: the evaluation text is too short.
        ConfigError: no prompt length fits the context.
    """
    groups = bench.groups
    context_length = min(target.context_length, engine.spec.context_length)
    workload = Workload(context_length=context_length, prompts={}, documents=[], skipped_prompt_lengths=())
    lease: AbstractContextManager[None] = nullcontext()
    if groups.keys() - {FILES_GROUP}:
        lease = device_lease.exclusive(progress) if isolated else device_lease.shared(progress)
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
                cores=_select_cores(runtime, target),
                context_length=workload.context_length,
                prompts={str(length): ids for length, ids in workload.prompts.items()},
                documents=str(documents),
                references={name: str(_check_reference(name, folder)) for name, folder in references.items()},
                scratch=str((directory / "scratch").absolute()),
                report=str(Path(work) / "report.json"),
                adapter=bench.adapter,
                memory_cap_bytes=target.memory_cap_bytes,
            )
            with lease:
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
            "prompt_lengths_left_out": workload.skipped_prompt_lengths,
            "runs": [asdict(run) for run in runs],
        }
        samples.write(record, directory)
    except OSError as error:
        raise MeasureError(
            f"cannot write the measurement ({error})",
            location=str(directory),
            hint="Free disk space or change the permissions",
        ) from error
    return tuple(
        measurement
        for name, probe in bench.probes.items()
        for measurement in summarize_runs(name, probe, runs, foreign_cpu_share=bench.foreign_cpu_share)
    )


def _select_cores(runtime: Runtime, target: Target) -> list[int]:
    """Return the cores for the measured processes: those that the runtime selects, else those of `pinned_cores`."""
    cores = procfs.pinned_cores(target.threads)
    selected = runtime.cpu_ids(len(cores)) if isinstance(runtime, SupportsAffinity) else ()
    return list(selected) or cores


def _check_reference(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise MeasureError(
            f"the folder of the reference {name!r} does not exist", location=str(folder), hint="Measure it first"
        )
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
    """Run as many processes as the probes request, and up to `bench.retries` more to replace disturbed ones."""
    if group == FILES_GROUP:
        report = child_process.collect_from_files(
            replace(job, probes={name: to_config(probe) for name, probe in probes.items()})
        )
        return [Run(group=group, disturbance="", foreign_cpu_share=0.0, report=report)]
    timed = {name: probe for name, probe in probes.items() if probe.TIMING_SENSITIVE}
    runs: list[Run] = []

    def run_process(selected: Mapping[str, Probe], description: str) -> None:
        progress(f"measuring {', '.join(selected)}: {description}")
        process_job = replace(
            job,
            probes={name: to_config(probe) for name, probe in selected.items()},
            memory_cap_bytes=job.memory_cap_bytes if group == GENERATION_GROUP else 0,
        )
        log = directory / samples.LOGS / f"{group}-{len(runs)}.log"
        if isolated:
            report = spawn(process_job, log, bench.timeout_s, progress)
        else:
            report = child_process.run(process_job, time.monotonic())
        runs.append(
            judge_run(
                group,
                report,
                timed.keys() & selected.keys(),
                foreign_cpu_share=bench.foreign_cpu_share,
                halves_tolerance=bench.halves_tolerance,
                slowed_share=bench.slowed_share,
            )
        )

    count = max(probe.processes for probe in probes.values())
    for number in range(count):
        selected = {name: probe for name, probe in probes.items() if probe.processes > number}
        run_process(selected, f"process {number + 1} of {count}")
    for retry in range(bench.retries):
        if all(len(select_undisturbed_runs(runs, name)) >= probe.processes for name, probe in timed.items()):
            break
        reason = next(run.disturbance for run in reversed(runs) if run.disturbance)
        run_process(timed, f"retry {retry + 1} of {bench.retries} because {reason}")
    return runs
