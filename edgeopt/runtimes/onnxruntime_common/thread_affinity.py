"""A processor for each thread that computes.

ONNX Runtime keeps the threads that it starts on the processors that it is told, and leaves the one that calls it, which
computes as they do, to its caller. That one is kept on its own while it computes and no longer: else what it starts
would be held there, too, and whatever the process does beside. Sources: sched_setaffinity(2),
onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from edgeopt.errors import BuildError, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.runtimes.decoding.incremental_session import Past

Computing = Callable[[], AbstractContextManager[None]]
"""Makes what the calling thread enters while it computes."""
_PART = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_FORM = "Give numbers as taskset takes them, such as 0,2 or 4-7"


def parse(listed: str | int) -> tuple[int, ...]:
    """Numbers of logical processors in their order, given as taskset takes them: `0,2` or `4-7`. Raises ConfigError."""
    found: list[int] = []
    for part in str(listed).split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{listed!r} lists no processors", location="affinity", hint=_FORM)
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1)
        if last < first or len(set(found)) < len(found):
            raise ConfigError(
                f"{part.strip()!r} of {listed!r} names none, or one again", location="affinity", hint=_FORM
            )
    return tuple(found)


def choose(processors: Sequence[int], threads: int) -> tuple[int, ...]:
    """The processor of each of `threads` threads: the first of those, which this process has to be allowed.

    Raises BuildError.
    """
    chosen, allowed = tuple(processors[:threads]), os.sched_getaffinity(0)
    if len(chosen) < threads:
        raise BuildError(
            f"{_listed(processors)} are too few processors for {threads} threads",
            location="runtime.affinity",
            hint="Give one for each thread, or take fewer threads: target.threads, taskset",
        )
    if foreign := [number for number in chosen if number not in allowed]:
        raise BuildError(
            f"this process may not use processor {_listed(foreign)}",
            location="runtime.affinity",
            hint=f"Choose of {_listed(sorted(allowed))}, or allow it others: taskset",
        )
    return chosen


def entry(chosen: Sequence[int]) -> str:
    """The threads that ONNX Runtime starts, in its own words: it counts from 1, and the calling thread is none."""
    return ";".join(str(number + 1) for number in chosen[1:])


def computing(chosen: Sequence[int]) -> Computing:
    """What keeps the calling thread on the first of the processors; where there is none it may move."""
    return partial(_on, chosen[0]) if chosen else nullcontext


class Kept:
    """A Past that is read on the processor of the calling thread."""

    def __init__(self, past: Past, computing: Computing) -> None:
        self._past, self._computing = past, computing

    def read(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        with self._computing():
            return self._past.read(tokens, rows)

    def back(self, count: int) -> None:
        self._past.back(count)


@contextmanager
def _on(processor: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
