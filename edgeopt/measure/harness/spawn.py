"""The parent's side of a measured process: start it fresh, wait for it, say why it failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import edgeopt
from edgeopt.core import units
from edgeopt.core.protocols import Progress
from edgeopt.errors import MeasureError
from edgeopt.machine import memory_cap
from edgeopt.measure.harness.child_process import Job

_LAST_WORDS = 400


def spawn(job: Job, log: Path, timeout_s: float, progress: Progress) -> dict[str, Any]:
    """Run `job` in a fresh interpreter and return its report; its output goes to `log`.

    Under a memory cap the engine's files are dropped from the page cache first, so that the process is charged for
    what it reads of them. Where this system enforces no cap, `progress` is told, and it runs without.

    Raises MeasureError with the child's last words, the signal that killed it, or the time-out.
    """
    job_path = Path(job.report).with_suffix(".job.json")
    job_path.write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "edgeopt.measure.harness.child_process", str(job_path)]
    with log.open("wb") as output, ExitStack() as held:
        try:
            before = held.enter_context(memory_cap.enforce_cap(job.memory_cap_bytes)) if job.memory_cap_bytes else []
        except memory_cap.CapUnavailableError as why:
            before = []
            progress(f"the memory cap of {_shown(job)} is not enforced: {why}")
        if before:
            memory_cap.drop_page_cache(Path(job.engine))
        child = subprocess.Popen(
            [*before, *command, repr(time.monotonic())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(len(job.cores)),
            start_new_session=True,
        )  # a session of its own: Ctrl-C reaches the parent alone, which then decides
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise MeasureError(
                f"the measured process took longer than {timeout_s:g} s",
                location=str(log),
                hint="Raise measure.timeout_s, or measure less",
            ) from error
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()
    if code != 0:
        raise _death(code, log, job)
    report: dict[str, Any] = json.loads(Path(job.report).read_text())
    return report


def _environment(threads: int) -> dict[str, str]:
    """This environment, with edgeopt importable and numeric libraries held to the target's threads."""
    paths = [str(Path(edgeopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **limits, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _shown(job: Job) -> str:
    return units.show(job.memory_cap_bytes / 2**20, "MiB")


def _death(code: int, log: Path, job: Job) -> MeasureError:
    hint = f"Read {log}"
    if code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            hint = f"The kernel does so when memory runs out: take a smaller model or context. {hint}"
        capped = f" under a memory cap of {_shown(job)}" if job.memory_cap_bytes else ""
        return MeasureError(f"the measured process was killed by {name}{capped}", hint=hint)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    words = lines[-1][-_LAST_WORDS:] if lines else "it said nothing"
    return MeasureError(f"the measured process failed: {words}", hint=hint)
