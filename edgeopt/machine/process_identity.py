"""Which process this is: its host, its number, and whether another one still lives."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


def boot_id() -> str:
    """The running kernel: containers beside one another share its devices."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def host_id() -> str:
    """The running kernel and the namespace of its process numbers."""
    return f"{boot_id()} {(_PROC / 'self/ns/pid').stat().st_ino}"


def identity(number: int) -> str:
    """Number and start of a process; empty where there is none, or where it is dead and only not yet waited for."""
    try:
        fields = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return ""
    return "" if fields[0] == "Z" else f"{number}:{fields[19]}"


def is_alive(process: str) -> bool:
    """Whether a process of this host, named by its `identity`, is still at work."""
    return identity(int(process.partition(":")[0])) == process
