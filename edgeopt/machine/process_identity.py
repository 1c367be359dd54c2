"""Identify a process across hosts and containers, and check if it is still alive."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


def boot_id() -> str:
    """Return the id of the running kernel; containers on one host share it."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def host_id() -> str:
    """Return the boot id and the PID namespace, within which process ids are unique."""
    return f"{boot_id()} {(_PROC / 'self/ns/pid').stat().st_ino}"


def identity(pid: int) -> str:
    """Return `PID:START_TIME` of a process; empty if it does not exist or is a zombie."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # the process has ended
        return ""
    return "" if fields[0] == "Z" else f"{pid}:{fields[19]}"


def is_alive(process: str) -> bool:
    """Return True if the process of this host with the given `identity` still runs."""
    return identity(int(process.partition(":")[0])) == process
