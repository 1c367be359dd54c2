"""Represent a worker of a study as the trial storage holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A registered worker.

    Attributes:
        worker: unique name.
        host: identifier of the running kernel and process namespace; process numbers are comparable within it.
        process: number and start time of the process, unique on `host`.
        role: `all`, `build`, `measure` or `sync`.
        code: version and digest of the code that the worker runs.
        beat: heartbeat counter.
    """

    worker: str
    host: str
    process: str
    role: str
    code: str
    beat: int
