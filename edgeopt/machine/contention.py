"""How fast cores compute just now, where other virtual machines share them.

A virtual core is one of the two threads of a physical one, as a rule. While its neighbour computes, all that runs here
takes longer, and no counter of this machine shows it. Seen on a shared AMD EPYC: engines decoded in 64 us a token or in
105, in turns of a tenth of a second to seconds, and the bit of work below took 0.25 ms or 0.40 ms with them.

Machines of their own have no such neighbours. Where they slow down, they are hot, and that is to be measured: all of
their moments count as usual.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from edgeopt.core.protocols import Session
from edgeopt.errors import MeasureError
from edgeopt.machine.procfs import ROOT

T = TypeVar("T")

STEPS = 10_000
"""Of the bit of work: some tenth of a millisecond."""
TOLERANCE = 1.15
"""Times the shortest that the bit of work took: what takes longer than that is slowed down."""
STRETCH_S = 0.05
"""The work between two looks at the pace."""
BURST_GAP_S = 20e-6
"""Between two tokens, less than an engine takes for one: both were computed together."""
PATIENCE = 5
"""How often work is done in all, at most, until there is a try that nobody slowed down."""


class ContentionProbe:
    """Looks at the pace of the cores that this thread may use; 0 on machines without neighbours."""

    def __init__(self, root: Path = ROOT) -> None:
        self._virtual = is_virtual(root)
        self.best_s = float("inf")

    def now(self) -> float:
        """Seconds that a fixed bit of work takes on the slowest of the cores."""
        if not self._virtual:
            return 0.0
        cores = os.sched_getaffinity(0)
        taken = max(map(_seconds_on, cores) if len(cores) > 1 else (_seconds(),))
        if len(cores) > 1:
            os.sched_setaffinity(0, cores)
        self.best_s = min(self.best_s, taken)
        return taken

    def is_undisturbed(self, pace_s: float) -> bool:
        """Whether nobody slowed down the core at a moment, as far as is known now."""
        return is_undisturbed(pace_s, self.best_s)

    def retry(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first try that nobody slowed down, or in that at the best pace."""
        tries = []
        for _ in range(PATIENCE):
            before = self.now()
            found = work()
            tries.append((max(before, self.now()), found))
            if self.is_undisturbed(tries[-1][0]):
                break
        return min(tries, key=lambda one: one[0])[1]


def is_virtual(root: Path = ROOT) -> bool:
    """Whether this is a virtual machine, whose cores others may share."""
    path = root / "proc/cpuinfo"
    return path.is_file() and " hypervisor" in path.read_text()


def is_undisturbed(pace_s: float, best_s: float) -> bool:
    return pace_s <= TOLERANCE * best_s


def select_undisturbed(values: Iterable[float], paces_s: Iterable[float], best_s: float) -> list[float]:
    """Those of the values that were found at a usual pace."""
    return [value for value, pace_s in zip(values, paces_s, strict=True) if is_undisturbed(pace_s, best_s)]


def time_decode_rounds(
    session: Session, prompt: Sequence[int], count: int, pace: ContentionProbe, *, rounds: int, most_s: float
) -> list[tuple[list[float], list[float]]]:
    """Times of tokens and the pace meanwhile, of `rounds` decodes or more: until as many tokens were at a usual pace.

    After `most_s` seconds it is left at that.
    """
    found: list[tuple[list[float], list[float]]] = []
    end = time.monotonic() + most_s
    while len(found) < rounds or (
        sum(len(select_undisturbed(*one, pace.best_s)) for one in found) < rounds * count and time.monotonic() < end
    ):
        found.append(time_tokens(session, prompt, count, pace))
    return found


def time_tokens(
    session: Session, prompt: Sequence[int], count: int, pace: ContentionProbe
) -> tuple[list[float], list[float]]:
    """Seconds of each of `count` tokens after the first, and the pace of the cores meanwhile.

    Of tokens that come at once each took its share of the time until they came.
    """
    times: list[float] = []
    paces: list[float] = []
    tokens = session.generate(prompt, count + 1, stop_at_end=False)
    made = int(next(tokens, None) is not None)
    while len(times) < count and made:
        before = pace.now()
        moments = [time.perf_counter()]
        for _ in tokens:
            moments.append(time.perf_counter())
            if moments[-1] - moments[0] > STRETCH_S:
                break
        if len(moments) == 1:
            break
        slower = max(before, pace.now())
        times += [after - earlier for earlier, after in pairwise(moments)]
        paces += [slower] * (len(moments) - 1)
    if len(times) != count:
        raise MeasureError(f"the engine generated {made + len(times)} of {count + 1} tokens")
    return spread_bursts(times), paces


def spread_bursts(times: Sequence[float]) -> list[float]:
    """The times between tokens, with those that came at once sharing what the first of them took."""
    starts = [index for index, seconds in enumerate(times) if index == 0 or seconds >= BURST_GAP_S]
    parts = [times[start:end] for start, end in pairwise([*starts, len(times)])]
    return [sum(part) / len(part) for part in parts for _ in part]


def _seconds_on(core: int) -> float:
    os.sched_setaffinity(0, {core})
    return _seconds()


def _seconds() -> float:
    """The shorter of two times, as an interrupt is no neighbour."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        sum(range(STEPS))
        found.append(time.perf_counter() - start)
    return min(found)
