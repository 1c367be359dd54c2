"""Cap the memory of measured processes with a control group.

The processes run in a control group of their own. The cap covers anonymous memory and cached file pages together, and
the group may not swap. To stay below the cap, the kernel drops cached file pages; if that is not enough, it kills
processes. References: Linux, admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst; systemd-run(1).
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

_SYSTEMD_TIMEOUT_S = 10.0
# control group file -> value that disables swap, for cgroup v2 and v1; a kernel has one of them or neither
_DISABLE_SWAP = {"memory.swap.max": "0", "memory.swappiness": "0"}
# the shell joins the group and then becomes the command, so that all pages of the command count
_ENTER = ("/bin/sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh")


class CapUnavailableError(Exception):
    """Error with the reason why this user cannot cap memory on this system."""


@contextmanager
def enforce_cap(cap_bytes: int, root: Path = ROOT) -> Iterator[list[str]]:
    """Yield a command prefix that limits a command and its children to `cap_bytes` while the block runs.

    Raises CapUnavailableError if this user can neither create a control group nor get one from systemd.
    """
    with ExitStack() as stack:
        try:
            prefix = stack.enter_context(_create_group(cap_bytes, root))
        except OSError as error:
            prefix = _prepare_systemd_scope(cap_bytes, group_error=f"cannot create a control group ({error})")
        yield prefix


def drop_page_cache(folder: Path) -> None:
    """Drop the files of `folder` from the page cache, so that the next reader is charged for their pages.

    Pages that another process has mapped stay.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the kernel does not drop dirty pages
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


@contextmanager
def _create_group(cap_bytes: int, root: Path) -> Iterator[list[str]]:
    """Create a control group below that of this process and yield the command prefix that joins it.

    Raises OSError unless the user is root or the group of this process is delegated to the user.
    """
    groups = control_groups("memory", root)
    if not groups:
        raise FileNotFoundError("no memory controller is mounted")
    folder = Path(mkdtemp(prefix="edgeopt-", dir=groups[0]))
    try:
        files = [folder / name for name in CAP_FILES if (folder / name).exists()]
        if not files:
            raise FileNotFoundError(f"{groups[0]} does not delegate the memory controller")
        files[0].write_text(str(cap_bytes))
        for name, value in _DISABLE_SWAP.items():
            if (folder / name).exists():
                (folder / name).write_text(value)
        yield [*_ENTER, str(folder / "cgroup.procs")]
    finally:
        folder.rmdir()


def _prepare_systemd_scope(cap_bytes: int, *, group_error: str) -> list[str]:
    """Return a `systemd-run` command prefix that starts a transient scope: a system scope for root, else a user scope.

    Raises CapUnavailableError if systemd-run is missing or fails.
    """
    systemd_run = shutil.which("systemd-run")
    if systemd_run is None:
        raise CapUnavailableError(f"{group_error}, and systemd-run is not installed")
    manager = [] if os.geteuid() == 0 else ["--user"]
    limits = ["-p", f"MemoryMax={cap_bytes}", "-p", "MemorySwapMax=0"]
    prefix = [systemd_run, *manager, "--scope", "--quiet", "--collect", *limits, "--"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True, text=True, timeout=_SYSTEMD_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[0]
        raise CapUnavailableError(f"{group_error}, and systemd-run failed ({reason})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CapUnavailableError(f"{group_error}, and systemd-run failed ({first_line(error)})") from error
    return prefix
