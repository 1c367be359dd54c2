"""What Linux says of a process and its machine, read from /proc and /sys without third-party code.

The measured process uses nothing else, so that its own memory and start stay honest. Every reader
takes the root folder it reads under, which tests replace.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
CAP_FILES = ("memory.max", "memory.limit_in_bytes")
"""Where a control group of version 2, or of version 1, has its cap."""
_UNCAPPED = 2**60  # version 1 says "no cap" by the largest number of pages
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def read_memory(root: Path = ROOT) -> dict[str, float]:
    """Bytes of this process: `rss`, `peak_rss`, and of the resident pages `private`, `shared`, `pss` and `huge`.

    The peak is VmHWM: `getrusage` would report the parent's peak where that was larger, because
    Linux keeps ru_maxrss across fork and exec. The others are counted page by page, where VmRSS is
    summed up lazily and may lag by some hundred kB.
    """
    rollup = _kilobytes(root / "proc/self/smaps_rollup")
    return {
        "rss_bytes": rollup["Rss"],
        "peak_rss_bytes": _kilobytes(root / "proc/self/status")["VmHWM"],
        "private_bytes": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "shared_bytes": rollup["Shared_Clean"] + rollup["Shared_Dirty"],
        "pss_bytes": rollup["Pss"],
        "huge_bytes": rollup["AnonHugePages"],
    }


def _kilobytes(path: Path) -> dict[str, float]:
    """`name: 123 kB` lines as bytes by name."""
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name: int(rest.split()[0]) * 1024.0 for name, rest in pairs}


def control_groups(controller: str, root: Path = ROOT) -> list[Path]:
    """Folders of the groups that hold this process to what `controller` says, its own first, of version 1 or 2."""
    mount = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = mount / controller
        elif controllers or (mount / controller).is_dir():  # of version 2 there is one group for all that v1 has not
            continue
        own = mount / path.strip("/")
        return [folder for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return [mount] if mount.is_dir() else []


def read_memory_cap(root: Path = ROOT) -> int | None:
    """Bytes that the kernel lets the control groups of this process hold; None where none of them is capped."""
    files = (folder / name for folder in control_groups("memory", root) for name in CAP_FILES)
    caps = [int(found) for found in map(read_text, files) if found.isdigit() and int(found) < _UNCAPPED]
    return min(caps, default=None)


def read_text(path: Path) -> str:
    """What a file of the kernel says; empty where there is none."""
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def count_page_faults() -> tuple[int, int]:
    """Pages that this process had mapped in since it started: from memory (minor), and read from storage (major)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt


def read_own_cpu_s() -> float:
    """CPU seconds that this process, all its threads and its finished children have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def read_busy_s(root: Path = ROOT) -> dict[int, float]:
    """Seconds since boot in which each core was not idle; time stolen by the hypervisor counts as busy.

    Guest time is left out because Linux already counts it as user time.
    """
    busy = {}
    for line in (root / "proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            busy[int(name[3:])] = (user + nice + system + irq + softirq + steal) * TICK_S
    return busy


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuClock:
    """A moment on the clocks that tell whose work the cores did."""

    time_s: float
    own_s: float
    busy_s: Mapping[int, float]

    @classmethod
    def now(cls) -> CpuClock:
        return cls(time_s=time.monotonic(), own_s=read_own_cpu_s(), busy_s=read_busy_s())


def foreign_cpu_share(start: CpuClock, end: CpuClock, cores: Iterable[int]) -> float:
    """Share of CPU capacity between two moments that other processes used, from 0 to 1.

    The larger of two shares counts: of all cores (they share memory and clock rate) and of `cores`,
    to which this process is pinned (on a large machine one lost core is a small share of all).
    Linux counts busy time in ticks, so one tick for each core is not held against anybody.
    """
    return max(_foreign(start, end, set(end.busy_s)), _foreign(start, end, set(cores) & set(end.busy_s)))


def _foreign(start: CpuClock, end: CpuClock, cores: set[int]) -> float:
    capacity_s = (end.time_s - start.time_s) * len(cores)
    if capacity_s <= 0:
        return 0.0
    used_s = sum(end.busy_s[core] - start.busy_s.get(core, 0.0) for core in cores)
    others_s = used_s - (end.own_s - start.own_s) - len(cores) * TICK_S
    return min(1.0, max(0.0, others_s / capacity_s))


def read_device_state(root: Path = ROOT) -> dict[str, float]:
    """`temperature_c` (hottest zone) and `frequency_mhz` (mean of the cores), each only where offered."""
    state = {}
    degrees = _numbers((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    if degrees:
        state["temperature_c"] = max(degrees) / 1e3
    hertz = _numbers((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if hertz:
        state["frequency_mhz"] = sum(hertz) / len(hertz) / 1e3
    return state


def _numbers(paths: Iterable[Path]) -> list[float]:
    found = []
    for path in paths:
        try:
            found.append(float(path.read_text()))
        except (OSError, ValueError):  # a sensor that is asleep or broken offers nothing
            continue
    return found


def pinned_cores(threads: int, root: Path = ROOT) -> list[int]:
    """`threads` of the cores allowed to this process (0: all); one of each physical core comes first."""
    allowed = sorted(os.sched_getaffinity(0))
    first: list[int] = []
    siblings: list[int] = []
    seen: set[str] = set()
    for core in allowed:
        path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        physical = path.read_text().strip() if path.is_file() else str(core)
        (siblings if physical in seen else first).append(core)
        seen.add(physical)
    return (first + siblings)[: threads or None]


@contextmanager
def pin_threads(threads: int) -> Iterator[None]:
    """Keep what this thread does inside the block, and the threads that it starts, on `threads` of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, pinned_cores(threads))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def exit_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of process id `parent`, dies."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the request was made
        os.kill(os.getpid(), signal.SIGKILL)
