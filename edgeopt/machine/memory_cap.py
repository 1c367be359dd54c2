"""A cap on the memory of measured processes, enforced by the kernel.

The processes live in a control group of their own, which may hold so many bytes of anonymous pages and of cached files
together and swaps none: the kernel drops cached pages of files to keep the cap, and kills where that is not enough.
Sources: Linux, admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst; systemd-run(1).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp

from edgeopt.errors import first_line
from edgeopt.machine.procfs import CAP_FILES, ROOT, control_groups

_TRY_S = 10.0
# file of a group -> what is written into it beside the cap, where the kernel has such a file
_WITHOUT_SWAP = {"memory.swap.max": "0", "memory.swappiness": "0"}
# the shell enters the group and becomes the command, so that all its pages are counted
_ENTER = ("/bin/sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh")


class CapUnavailableError(Exception):
    """Why nothing can be capped on this system by this user."""


@contextmanager
def enforce_cap(cap_bytes: int, root: Path = ROOT) -> Iterator[list[str]]:
    """Put before a command, what is given holds it and all that it starts to `cap_bytes` inside the block.

    Raises UnenforcedError where this user may neither make a control group nor ask systemd for one.
    """
    with ExitStack() as held:
        try:
            command = held.enter_context(_group(cap_bytes, root))
        except OSError as error:
            command = _scope(cap_bytes, fallback=f"no control group can be made ({error})")
        yield command


def drop_page_cache(folder: Path) -> None:
    """Have the kernel forget the contents of files, so that whoever reads them next is charged for them.

    What another process has mapped stays.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # pages that are yet to be written cannot be dropped
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


@contextmanager
def _group(cap_bytes: int, root: Path) -> Iterator[list[str]]:
    """A group below that of this process, for whoever may make one: root, or a user to whom it was delegated."""
    groups = control_groups("memory", root)
    if not groups:
        raise FileNotFoundError("no memory controller is mounted")
    folder = Path(mkdtemp(prefix="edgeopt-", dir=groups[0]))
    try:
        files = [folder / name for name in CAP_FILES if (folder / name).exists()]
        if not files:
            raise FileNotFoundError(f"{groups[0]} passes no memory controller on")
        files[0].write_text(str(cap_bytes))
        for name, text in _WITHOUT_SWAP.items():
            if (folder / name).exists():
                (folder / name).write_text(text)
        yield [*_ENTER, str(folder / "cgroup.procs")]
    finally:
        folder.rmdir()


def _scope(cap_bytes: int, *, fallback: str) -> list[str]:
    """A transient scope of systemd: of the system for root, else of the user's own manager."""
    systemd_run = shutil.which("systemd-run")
    if systemd_run is None:
        raise CapUnavailableError(f"{fallback}, and there is no systemd-run")
    whose = [] if os.geteuid() == 0 else ["--user"]
    caps = ["-p", f"MemoryMax={cap_bytes}", "-p", "MemorySwapMax=0"]
    command = [systemd_run, *whose, "--scope", "--quiet", "--collect", *caps, "--"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, text=True, timeout=_TRY_S)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[0]
        raise CapUnavailableError(f"{fallback}, and systemd-run refuses ({said})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CapUnavailableError(f"{fallback}, and systemd-run fails ({first_line(error)})") from error
    return command
