"""Read the state of processes and the machine from /proc and /sys, with the standard library only.

The measured process imports no other monitoring code, so that its memory and start-up time stay undistorted. Functions
take the root folder as a parameter, which tests replace.
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
"""Files of a control group that hold its memory cap: version 2, version 1."""
_UNCAPPED = 2**60  # version 1 expresses "no cap" by the largest page count
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def read_memory(root: Path = ROOT) -> dict[str, float]:
    """Return the memory of this process in bytes: RSS, peak RSS, private and shared pages, PSS and huge pages.

    The peak is VmHWM. `getrusage` might report a larger peak of the parent, because Linux keeps ru_maxrss across fork
    and exec. The other values come from smaps_rollup, which counts each page. VmRSS is less accurate: the kernel
    updates it with a lag of some hundred kB.
    """
    rollup = _read_kb_fields(root / "proc/self/smaps_rollup")
    return {
        "rss_bytes": rollup["Rss"],
        "peak_rss_bytes": _read_kb_fields(root / "proc/self/status")["VmHWM"],
        "private_bytes": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "shared_bytes": rollup["Shared_Clean"] + rollup["Shared_Dirty"],
        "pss_bytes": rollup["Pss"],
        "huge_bytes": rollup["AnonHugePages"],
    }


def _read_kb_fields(path: Path) -> dict[str, float]:
    """Return the `name: 123 kB` lines of a file as bytes by name."""
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name: int(rest.split()[0]) * 1024.0 for name, rest in pairs}


def control_groups(controller: str, root: Path = ROOT) -> list[Path]:
    """Return the folders of the control groups of this process for `controller`, the innermost first.

    Supports cgroup versions 1 and 2, and systems that mount both.
    """
    mount = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = mount / controller
        elif controllers or (mount / controller).is_dir():  # version 2 only has the controllers that version 1 lacks
            continue
        own = mount / path.strip("/")
        return [folder for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return [mount] if mount.is_dir() else []


def read_memory_cap(root: Path = ROOT) -> int | None:
    """Return the lowest memory cap of the control groups of this process, in bytes; None if none is capped."""
    files = (folder / name for folder in control_groups("memory", root) for name in CAP_FILES)
    caps = [int(value) for value in map(read_text, files) if value.isdigit() and int(value) < _UNCAPPED]
    return min(caps, default=None)


def read_text(path: Path) -> str:
    """Return the stripped content of a file; empty if it does not exist."""
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def count_page_faults() -> tuple[int, int]:
    """Return the numbers of minor and major page faults of this process; a major fault reads from storage."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt


def read_own_cpu_s() -> float:
    """Return the CPU seconds used by this process, its threads and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def read_busy_s(root: Path = ROOT) -> dict[int, float]:
    """Return the busy seconds of each core since boot; time stolen by the hypervisor counts as busy.

    Linux already includes guest time in user time.
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
    """Snapshot of the monotonic clock, the CPU time of this process and the busy time of each core.

    Attributes:
        time_s: monotonic time.
        own_s: result of `read_own_cpu_s`.
        busy_s: result of `read_busy_s`.
    """

    time_s: float
    own_s: float
    busy_s: Mapping[int, float]

    @classmethod
    def now(cls) -> CpuClock:
        """Take a snapshot."""
        return cls(time_s=time.monotonic(), own_s=read_own_cpu_s(), busy_s=read_busy_s())


def foreign_cpu_share(start: CpuClock, end: CpuClock, cores: Iterable[int]) -> float:
    """Return the share of CPU capacity that other processes used between two snapshots, from 0 to 1.

    The result is the larger of two shares: that of all cores, because they share memory and clock rate, and that of
    `cores`, to which this process is pinned. On a large machine, one lost core is a small share of all cores. Linux
    counts busy time in ticks, so one tick per core is ignored.
    """
    return max(_foreign_share(start, end, set(end.busy_s)), _foreign_share(start, end, set(cores) & set(end.busy_s)))


def _foreign_share(start: CpuClock, end: CpuClock, cores: set[int]) -> float:
    capacity_s = (end.time_s - start.time_s) * len(cores)
    if capacity_s <= 0:
        return 0.0
    used_s = sum(end.busy_s[core] - start.busy_s.get(core, 0.0) for core in cores)
    others_s = used_s - (end.own_s - start.own_s) - len(cores) * TICK_S
    return min(1.0, max(0.0, others_s / capacity_s))


def read_device_state(root: Path = ROOT) -> dict[str, float]:
    """Return `temperature_c` of the hottest zone and mean `frequency_mhz` of the cores, each only if available."""
    state = {}
    millidegrees = _read_numbers((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    if millidegrees:
        state["temperature_c"] = max(millidegrees) / 1e3
    frequencies_khz = _read_numbers((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if frequencies_khz:
        state["frequency_mhz"] = sum(frequencies_khz) / len(frequencies_khz) / 1e3
    return state


def _read_numbers(paths: Iterable[Path]) -> list[float]:
    values = []
    for path in paths:
        try:
            values.append(float(path.read_text()))
        except (OSError, ValueError):  # the sensor is suspended or defective
            continue
    return values


def pinned_cores(threads: int, root: Path = ROOT) -> list[int]:
    """Return `threads` cores that this process may use, or all if 0; the first ones are on distinct physical cores."""
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
    """Pin this thread, and the threads it starts, to `threads` cores while the block runs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, pinned_cores(threads))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def exit_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent, the process with the id `parent`, dies.

    Raises OSError if the kernel rejects the request.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # the parent died before the request took effect
        os.kill(os.getpid(), signal.SIGKILL)
