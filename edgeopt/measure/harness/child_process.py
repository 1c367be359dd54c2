"""The measured process: `python -m edgeopt.measure.harness.child_process JOB.json SPAWN_TIME`.

It opens one engine, lets each probe collect its samples and writes them to the job's report. It
imports the standard library and edgeopt's plain data types alone, so that its own start and memory
stay small beside those of the runtime. Whatever fails ends it with a traceback, which the parent reads.
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
    """What one measured process does, in plain data.

    Attributes:
        parent: process id of the process that spawned it and whose death ends it.
        runtime, probes: parts as edgeopt.core.config_objects.describe gives them; probes collect in their order.
        documents: a JSON file of token id windows, read by the probes that need them.
        prompts: token ids by the length of the prompt.
        adapter: chosen in every request that names no other; an engine without adapters has none to choose.
        memory_cap_bytes: what the kernel is to hold the process to; 0: nothing.
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
class EngineSubject:
    """The Subject of probes."""

    job: Job
    engine: Engine
    session: Session
    marks: Mapping[str, Mapping[str, float]]

    @property
    def threads(self) -> int:
        return len(self.job.cores)

    @property
    def context_length(self) -> int:
        return self.job.context_length

    @property
    def memory_cap_bytes(self) -> int:
        return self.job.memory_cap_bytes

    @cached_property
    def prompts(self) -> Mapping[int, list[int]]:
        return {int(length): ids for length, ids in self.job.prompts.items()}

    @cached_property
    def documents(self) -> list[list[int]]:
        windows: list[list[int]] = json.loads(Path(self.job.documents).read_text())
        return windows

    @property
    def references(self) -> Mapping[str, Path]:
        return {name: Path(folder) for name, folder in self.job.references.items()}

    @property
    def scratch(self) -> Path:
        return Path(self.job.scratch)


@dataclass(slots=True, kw_only=True)
class StartupMarks:
    """Moments of the start-up; a mark's time leaves out what setting earlier marks took."""

    taken: dict[str, dict[str, float]] = field(default_factory=dict)
    own_s: float = 0.0

    def set(self, name: str) -> None:
        start = time.monotonic()
        self.taken[name] = {"time_s": start - self.own_s, **procfs.read_memory()}
        self.own_s += time.monotonic() - start


class UnopenedSession:
    """The session of an engine of which the files alone are looked at."""

    def __getattr__(self, name: str) -> Any:
        raise MeasureError(f"a probe that looks at files asked for {name}", hint="Give it another GROUP than files")


def collect_from_files(job: Job) -> dict[str, Any]:
    """Let the probes collect from the engine's files, without a session; the report as plain data."""
    session: Any = UnopenedSession()
    subject = EngineSubject(job=job, engine=Engine.read(Path(job.engine)), session=session, marks={})
    samples = {name: _probe(name, described).collect(subject) for name, described in job.probes.items()}
    return {"marks": {}, "sections": {}, "samples": samples}


def run(job: Job, spawned_s: float) -> dict[str, Any]:
    """Open the engine, let the probes collect; the report as plain data."""
    marks = StartupMarks(taken={"spawned": {"time_s": spawned_s}})
    started = CpuClock.now()
    marks.set("bare")
    runtime_class = resolve(job.runtime["_target_"], "runtime")
    for library in runtime_class.LIBRARIES:
        import_module(library)
    runtime = instantiate(job.runtime, "runtime")
    engine = Engine.read(Path(job.engine))
    marks.set("imported")
    session = runtime.open(engine, threads=len(job.cores))
    marks.set("loaded")
    if job.adapter and engine.spec.adapters:
        session = AdapterSession(session=session, adapter=job.adapter)
    subject = EngineSubject(job=job, engine=engine, session=session, marks=marks.taken)
    for _ in session.generate(subject.prompts[min(subject.prompts)], 1, stop_at_end=False):
        pass
    marks.set("first_token")
    sections = {"start": _section(started, job.cores)}
    samples = {}
    for name, described in job.probes.items():
        probe = _probe(name, described)
        started = CpuClock.now()
        samples[name] = probe.collect(subject)
        sections[name] = _section(started, job.cores)
    session.close()
    computed_by = list(session.computed_by)
    return {"computed_by": computed_by, "marks": marks.taken, "sections": sections, "samples": samples}


def _probe(name: str, described: Mapping[str, Any]) -> Any:
    return instantiate(described, f"measure.probes.{name}")


def _section(started: CpuClock, cores: list[int]) -> dict[str, float]:
    """How long a stretch of work took, whom it shared the machine with and how hot that was."""
    ended = CpuClock.now()
    return {
        "elapsed_s": ended.time_s - started.time_s,
        "foreign_cpu_share": procfs.foreign_cpu_share(started, ended, cores),
        **procfs.read_device_state(),
    }


def main(job_path: str, spawned_s: str) -> None:
    job = Job(**json.loads(Path(job_path).read_text()))
    procfs.exit_with_parent(job.parent)
    os.sched_setaffinity(0, job.cores)
    report = run(job, float(spawned_s))
    Path(job.report).write_text(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
