"""Run one measurement job: `python -m edgeopt.measure.harness.child_process JOB.json SPAWN_TIME`.

The process opens one engine, lets each probe collect its samples, and writes the report of the job. It imports only
the standard library and edgeopt's plain data types, so that its start-up time and memory stay small compared with the
runtime's. An error ends it with a traceback, which the parent reads from the log.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.core.artifact import Engine
from edgeopt.core.config_objects import instantiate, resolve
from edgeopt.errors import MeasureError
from edgeopt.machine import procfs
from edgeopt.machine.procfs import CpuClock
from edgeopt.measure.harness.adapter_session import AdapterSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeopt.core.protocols import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work of one measured process, as plain data.

    Attributes:
        parent: process id of the parent; the measured process ends when the parent dies.
        runtime: config of the runtime, from `to_config`.
        probes: probe configs by name; the probes collect in this order.
        engine: folder of the engine.
        cores: CPU cores to which the process is pinned.
        context_length: largest number of tokens of a sequence, prompt and generated tokens together.
        prompts: token ids by prompt length.
        documents: JSON file with the evaluation windows, read only by probes that need them.
        references: scratch folders of earlier measurements by name.
        scratch: folder for files that later measurements use as a reference.
        report: JSON file to write.
        adapter: default adapter of every request; ignored for an engine without adapters.
        memory_cap_bytes: memory cap that the kernel enforces on the process; 0 for no cap.
    """

    parent: int
    runtime: Mapping[str, Any]
    probes: Mapping[str, Mapping[str, Any]]
    engine: str
    cores: list[int]
    context_length: int
    prompts: Mapping[str, list[int]]
    documents: str
    references: Mapping[str, str]
    scratch: str
    report: str
    adapter: str | None = None
    memory_cap_bytes: int = 0


@dataclass(kw_only=True)
class EngineContext:
    """An open engine with its workload; implements `ProbeContext`."""

    job: Job
    engine: Engine
    session: Session
    marks: Mapping[str, Mapping[str, float]]

    @property
    def threads(self) -> int:
        """Return the number of threads, one per pinned core."""
        return len(self.job.cores)

    @property
    def context_length(self) -> int:
        """Return the largest number of tokens of a sequence."""
        return self.job.context_length

    @property
    def memory_cap_bytes(self) -> int:
        """Return the requested memory cap; 0 for no cap."""
        return self.job.memory_cap_bytes

    @cached_property
    def prompts(self) -> Mapping[int, list[int]]:
        """Return the token ids of each prompt by its length."""
        return {int(length): ids for length, ids in self.job.prompts.items()}

    @cached_property
    def documents(self) -> list[list[int]]:
        """Read the evaluation windows of token ids."""
        windows: list[list[int]] = json.loads(Path(self.job.documents).read_text())
        return windows

    @property
    def references(self) -> Mapping[str, Path]:
        """Return the scratch folders of earlier measurements by name."""
        return {name: Path(folder) for name, folder in self.job.references.items()}

    @property
    def scratch(self) -> Path:
        """Return the folder whose files outlive the process."""
        return Path(self.job.scratch)


@dataclass(slots=True, kw_only=True)
class StartupMarks:
    """Time and memory at points of the start-up.

    Attributes:
        marks: `time_s` and memory values by name of the point.
        overhead_s: seconds spent on recording, which later times exclude.
    """

    marks: dict[str, dict[str, float]] = field(default_factory=dict)
    overhead_s: float = 0.0

    def record(self, name: str) -> None:
        """Record the current time and memory as the point `name`."""
        start = time.monotonic()
        self.marks[name] = {"time_s": start - self.overhead_s, **procfs.read_memory()}
        self.overhead_s += time.monotonic() - start


class UnopenedSession:
    """Session for probes of the group `files`: every access raises MeasureError."""

    def __getattr__(self, name: str) -> Any:
        """Raise MeasureError, because file probes have no session."""
        raise MeasureError(
            f"a probe of the group 'files' must not use the session, got access to {name!r}",
            hint="Change the GROUP of the probe",
        )


def collect_from_files(job: Job) -> dict[str, Any]:
    """Let the probes collect from the engine's files without opening it; return the report."""
    session: Any = UnopenedSession()
    context = EngineContext(job=job, engine=Engine.read(Path(job.engine)), session=session, marks={})
    samples = {name: _instantiate_probe(name, config).collect(context) for name, config in job.probes.items()}
    return {"marks": {}, "sections": {}, "samples": samples}


def run(job: Job, spawned_s: float) -> dict[str, Any]:
    """Open the engine, let the probes collect, and return the report as plain data.

    `spawned_s` is the monotonic time at which the parent started the process. The report has the marks of the start-up,
    elapsed time and foreign load by section, and the samples by probe.
    """
    startup = StartupMarks(marks={"spawned": {"time_s": spawned_s}})
    started = CpuClock.now()
    startup.record("bare")
    runtime_class = resolve(job.runtime["_target_"], "runtime")
    for library in runtime_class.LIBRARIES:
        import_module(library)
    runtime = instantiate(job.runtime, "runtime")
    engine = Engine.read(Path(job.engine))
    startup.record("imported")
    session = runtime.open(engine, threads=len(job.cores))
    startup.record("loaded")
    if job.adapter and engine.spec.adapters:
        session = AdapterSession(session=session, adapter=job.adapter)
    context = EngineContext(job=job, engine=engine, session=session, marks=startup.marks)
    for _ in session.generate(context.prompts[min(context.prompts)], 1, stop_at_end=False):
        pass
    startup.record("first_token")
    sections = {"start": _section(started, job.cores)}
    samples = {}
    for name, config in job.probes.items():
        probe = _instantiate_probe(name, config)
        started = CpuClock.now()
        samples[name] = probe.collect(context)
        sections[name] = _section(started, job.cores)
    session.close()
    backends = list(session.backends)
    return {"computed_by": backends, "marks": startup.marks, "sections": sections, "samples": samples}


def _instantiate_probe(name: str, config: Mapping[str, Any]) -> Any:
    return instantiate(config, f"measure.probes.{name}")


def _section(started: CpuClock, cores: list[int]) -> dict[str, float]:
    """Return elapsed time, foreign CPU share and device state since `started`."""
    ended = CpuClock.now()
    return {
        "elapsed_s": ended.time_s - started.time_s,
        "foreign_cpu_share": procfs.foreign_cpu_share(started, ended, cores),
        **procfs.read_device_state(),
    }


def main(job_path: str, spawned_s: str) -> None:
    """Run the job in `job_path`, pinned to its cores, and write its report."""
    job = Job(**json.loads(Path(job_path).read_text()))
    procfs.exit_with_parent(job.parent)
    os.sched_setaffinity(0, job.cores)
    report = run(job, float(spawned_s))
    Path(job.report).write_text(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
