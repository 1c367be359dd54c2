"""Detect when other virtual machines slow down the cores of this one, and mark the tokens timed at those moments.

A virtual core is usually one of the two threads of a physical core. While the other thread computes, this one runs
slower, and no counter of this machine shows it. On a shared AMD EPYC, engines decoded a token in 64 us or in 105 us,
in phases of a tenth of a second to seconds. The probe workload below took 0.25 ms or 0.40 ms in the same phases.

A physical machine has no such neighbors. It slows down because of heat, and measurements must include that. On a
physical machine, every measurement counts as undisturbed.
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

PROBE_ITERATIONS = 10_000
"""Loop length of the probe workload: a few tenths of a millisecond."""
TOLERANCE = 1.15
"""A measurement is disturbed if the probe takes longer than this multiple of its best time."""
PROBE_INTERVAL_S = 0.05
"""Decoding time after which the next probe runs."""
BURST_GAP_S = 20e-6
"""Tokens closer together than this were computed in one step: no engine computes a token this fast."""
MAX_ATTEMPTS = 5
"""Attempts of `ContentionProbe.retry`, the first one included."""


class ContentionProbe:
    """Contention probe that times a fixed workload on every core that this thread may use.

    Attributes:
        best_s: shortest probe time so far.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._virtual = is_virtual(root)
        self.best_s = float("inf")

    def measure_s(self) -> float:
        """Return the seconds that the workload takes on the slowest core; 0 on a physical machine."""
        if not self._virtual:
            return 0.0
        cores = os.sched_getaffinity(0)
        slowest_s = max(map(_workload_s_on, cores) if len(cores) > 1 else (_workload_s(),))
        if len(cores) > 1:
            os.sched_setaffinity(0, cores)
        self.best_s = min(self.best_s, slowest_s)
        return slowest_s

    def is_undisturbed(self, probe_s: float) -> bool:
        """Return True if `probe_s` is within the tolerance of the best probe time so far."""
        return is_undisturbed(probe_s, self.best_s)

    def retry(self, work: Callable[[], T]) -> T:
        """Call `work` until it runs undisturbed and return its result.

        After `MAX_ATTEMPTS` calls, return the result of the least disturbed one.
        """
        attempts = []
        for _ in range(MAX_ATTEMPTS):
            before_s = self.measure_s()
            result = work()
            attempts.append((max(before_s, self.measure_s()), result))
            if self.is_undisturbed(attempts[-1][0]):
                break
        return min(attempts, key=lambda attempt: attempt[0])[1]


def is_virtual(root: Path = ROOT) -> bool:
    """Return True if this is a virtual machine, which may share its physical cores with others."""
    path = root / "proc/cpuinfo"
    return path.is_file() and " hypervisor" in path.read_text()


def is_undisturbed(probe_s: float, best_s: float) -> bool:
    """Return True if `probe_s` is within the tolerance of `best_s`."""
    return probe_s <= TOLERANCE * best_s


def select_undisturbed(values: Iterable[float], probe_times_s: Iterable[float], best_s: float) -> list[float]:
    """Return the values whose probe time counts as undisturbed."""
    return [value for value, probe_s in zip(values, probe_times_s, strict=True) if is_undisturbed(probe_s, best_s)]


def time_decode_rounds(
    session: Session, prompt: Sequence[int], count: int, probe: ContentionProbe, *, rounds: int, timeout_s: float
) -> list[tuple[list[float], list[float]]]:
    """Decode `count` tokens per round and return (token times, probe times) of each round, in seconds.

    Run at least `rounds` rounds. Continue until `rounds * count` tokens were undisturbed or `timeout_s` has passed.
    """
    results: list[tuple[list[float], list[float]]] = []
    end_s = time.monotonic() + timeout_s
    while len(results) < rounds or (
        sum(len(select_undisturbed(*result, probe.best_s)) for result in results) < rounds * count
        and time.monotonic() < end_s
    ):
        results.append(time_tokens(session, prompt, count, probe))
    return results


def time_tokens(
    session: Session, prompt: Sequence[int], count: int, probe: ContentionProbe
) -> tuple[list[float], list[float]]:
    """Return (token times, probe times) of `count` tokens after the first, in seconds.

    Tokens that arrive in one burst share its time equally. Raises MeasureError if the engine generates too few tokens.
    """
    times_s: list[float] = []
    probe_times_s: list[float] = []
    tokens = session.generate(prompt, count + 1, stop_at_end=False)
    first_count = int(next(tokens, None) is not None)
    while len(times_s) < count and first_count:
        before_s = probe.measure_s()
        arrivals_s = [time.perf_counter()]
        for _ in tokens:
            arrivals_s.append(time.perf_counter())
            if arrivals_s[-1] - arrivals_s[0] > PROBE_INTERVAL_S:
                break
        if len(arrivals_s) == 1:
            break
        slower_s = max(before_s, probe.measure_s())
        times_s += [later - earlier for earlier, later in pairwise(arrivals_s)]
        probe_times_s += [slower_s] * (len(arrivals_s) - 1)
    if len(times_s) != count:
        raise MeasureError(f"the engine must generate {count + 1} tokens, got {first_count + len(times_s)}")
    return spread_bursts(times_s), probe_times_s


def spread_bursts(times_s: Sequence[float]) -> list[float]:
    """Return the token times with the time of each burst divided equally among its tokens."""
    starts = [index for index, seconds in enumerate(times_s) if index == 0 or seconds >= BURST_GAP_S]
    bursts = [times_s[start:end] for start, end in pairwise([*starts, len(times_s)])]
    return [sum(burst) / len(burst) for burst in bursts for _ in burst]


def _workload_s_on(core: int) -> float:
    os.sched_setaffinity(0, {core})
    return _workload_s()


def _workload_s() -> float:
    """Return the seconds of the faster of two runs: an interrupt during one of them is not contention."""
    durations_s = []
    for _ in range(2):
        start_s = time.perf_counter()
        sum(range(PROBE_ITERATIONS))
        durations_s.append(time.perf_counter() - start_s)
    return min(durations_s)
