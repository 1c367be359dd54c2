"""Pin each compute thread of a session to one logical processor.

ONNX Runtime pins the threads that it starts, but not the calling thread, which computes as well. This module pins the
calling thread while it computes and restores its affinity afterwards: otherwise later threads and other work of the
process would inherit it. Sources: sched_setaffinity(2), onnxruntime_session_options_config_keys.h.
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

    from edgeopt.runtimes.decoding.incremental_session import SequenceState

ThreadPinning = Callable[[], AbstractContextManager[None]]
"""Create the context manager in which the calling thread computes."""
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_HINT = "Use numbers and ranges as in taskset, such as 0,2 or 4-7"


def parse(affinity: str | int) -> tuple[int, ...]:
    """Return the logical processors of a list in taskset syntax, such as `0,2` or `4-7`, in the order given.

    Raises ConfigError if the list is malformed or names a processor twice.
    """
    processors: list[int] = []
    for part in str(affinity).split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"`affinity` must be a list of processors, got {affinity!r}", location="affinity", hint=_HINT
            )
        first, last = int(match[1]), int(match[2] or match[1])
        processors += range(first, last + 1)
        if last < first or len(set(processors)) < len(processors):
            raise ConfigError(
                f"`affinity` must not contain empty ranges or duplicates, got {part.strip()!r} in {affinity!r}",
                location="affinity",
                hint=_HINT,
            )
    return tuple(processors)


def assign(processors: Sequence[int], threads: int) -> tuple[int, ...]:
    """Return the processor of each of `threads` threads.

    Raises BuildError if there are too few processors or this process is not allowed to use one of them.
    """
    assigned, allowed = tuple(processors[:threads]), os.sched_getaffinity(0)
    if len(assigned) < threads:
        raise BuildError(
            f"`affinity` must name a processor for each of {threads} threads, got {_join(processors)}",
            location="runtime.affinity",
            hint="Add processors, or reduce target.threads",
        )
    if forbidden := [processor for processor in assigned if processor not in allowed]:
        raise BuildError(
            f"this process is not allowed to use processor {_join(forbidden)}",
            location="runtime.affinity",
            hint=f"Use some of {_join(sorted(allowed))}, or extend the allowed ones with taskset",
        )
    return assigned


def config_entry(assigned: Sequence[int]) -> str:
    """Return the value of `session.intra_op_thread_affinities` for all threads but the calling one.

    ONNX Runtime counts processors from 1.
    """
    return ";".join(str(processor + 1) for processor in assigned[1:])


def pin_calling_thread(assigned: Sequence[int]) -> ThreadPinning:
    """Return a factory of contexts that pin the calling thread to the first processor, or do nothing without any."""
    return partial(_pinned, assigned[0]) if assigned else nullcontext


class PinnedState:
    """A SequenceState that computes with the calling thread pinned to its processor."""

    def __init__(self, state: SequenceState, pin_thread: ThreadPinning) -> None:
        self._state, self._pin_thread = state, pin_thread

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        with self._pin_thread():
            return self._state.forward(tokens, rows)

    def rollback(self, count: int) -> None:
        self._state.rollback(count)


@contextmanager
def _pinned(processor: int) -> Iterator[None]:
    previous = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, previous)


def _join(processors: Sequence[int]) -> str:
    return ", ".join(map(str, processors))
