"""Run a measured process and report its failure."""

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

_LAST_LINE_LENGTH = 400


def spawn(job: Job, log: Path, timeout_s: float, progress: Progress) -> dict[str, Any]:
    """Run `job` in a new Python process and return its report. The output of the process goes to `log`.

    With a memory cap, the engine's files are first dropped from the page cache, so that the kernel charges the process
    for the pages it reads. If this system cannot enforce the cap, the process runs without it and `progress` receives
    a warning.

    Raises MeasureError if the process exits with an error, is killed by a signal, or exceeds the time limit.
    """
    job_path = Path(job.report).with_suffix(".job.json")
    job_path.write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "edgeopt.measure.harness.child_process", str(job_path)]
    with log.open("wb") as output, ExitStack() as stack:
        try:
            launcher = stack.enter_context(memory_cap.enforce_cap(job.memory_cap_bytes)) if job.memory_cap_bytes else []
        except memory_cap.CapUnavailableError as error:
            launcher = []
            progress(f"memory cap of {_format_cap(job)} not enforced: {error}")
        if launcher:
            memory_cap.drop_page_cache(Path(job.engine))
        child = subprocess.Popen(
            [*launcher, *command, repr(time.monotonic())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(len(job.cores)),
            start_new_session=True,  # Ctrl-C reaches only the parent, which then kills the child
        )
        try:
            exit_code = child.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise MeasureError(
                f"the measured process must finish within {timeout_s:g} s",
                location=str(log),
                hint="Increase measure.timeout_s, or reduce the workload",
            ) from error
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()
    if exit_code != 0:
        raise _failure_error(exit_code, log, job)
    report: dict[str, Any] = json.loads(Path(job.report).read_text())
    return report


def _environment(threads: int) -> dict[str, str]:
    """Return the environment for a process that can import edgeopt and uses `threads` threads in numeric libraries."""
    paths = [str(Path(edgeopt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **limits, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _format_cap(job: Job) -> str:
    return units.format_quantity(job.memory_cap_bytes / 2**20, "MiB")


def _failure_error(exit_code: int, log: Path, job: Job) -> MeasureError:
    """Return the error for an exit code, with the signal that killed the process or the last line of the log."""
    hint = f"Read {log}"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        if -exit_code == signal.SIGKILL:
            hint = f"The kernel kills a process when memory runs out: use a smaller model or context. {hint}"
        cap = f" under a memory cap of {_format_cap(job)}" if job.memory_cap_bytes else ""
        return MeasureError(f"the measured process was killed by {name}{cap}", hint=hint)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last_line = lines[-1][-_LAST_LINE_LENGTH:] if lines else "no output"
    return MeasureError(f"the measured process failed: {last_line}", hint=hint)
