"""What of a process lies in memory: mapped files, pages that are given back, and pages that are joined to huge ones.

Sources: proc(5), madvise(2), Linux's admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgeopt.errors import BuildError
from edgeopt.runtimes.onnxruntime_common.session_options import MappedWeights, SessionOptions

WILL_NEED, DO_NOT_NEED, POPULATE_READ, COLLAPSE = 3, 4, 22, 25
"""Advice to the kernel: asm-generic/mman-common.h."""
HUGE_BYTES = 2 * 2**20
JOINED_AFTER_S = 0.2
"""Seconds after an engine was opened: joining pages takes a core, and would have the first token come later."""
_MENDS = {
    "prefaulted": "Give on_demand, or use Linux 5.14 or newer",
    "locked": "Give prefaulted, or let the process lock as much: ulimit -l",
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_MAPS = Path("/proc/self/maps")


def advise(address: int, length: int, advice: int) -> None:
    """Raises OSError."""
    if _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice):
        raise OSError(ctypes.get_errno(), f"madvise({advice}) failed")


def give_back(address: int, length: int) -> None:
    """Let go of mapped pages of a file, which stay in it. Raises OSError."""
    advise(address, length, DO_NOT_NEED)


def mappings(file: Path) -> list[tuple[int, int, int]]:
    """Start address, offset in the file and length of each mapping of `file` in this process."""
    name = str(file.resolve())
    return [(start, offset, length) for start, offset, length, _, mapped in _maps() if mapped == name]


def settle(data: Path, knobs: SessionOptions) -> None:
    """See to the memory of an engine that was opened just now, whose weights lie in the file `data`.

    What was read of weights that are packed on disk is given back, and what is needed is read again: those alone that
    are packed. Raises BuildError as join_pages.
    """
    if knobs.packed_on_disk:
        for start, length in pieces(data):
            give_back(start, length)
    if knobs.huge_pages:
        join_pages()


def hold(mapped: Iterable[tuple[int, int]], how: MappedWeights) -> None:
    """Have mapped weights, start and length of each piece, in memory as it is asked for. Raises BuildError."""
    if how == "on_demand":
        return
    for start, length in mapped:
        try:
            if how == "prefaulted":
                advise(start, length, POPULATE_READ)
            elif _LIBC.mlock(ctypes.c_void_p(start), ctypes.c_size_t(length)):
                raise OSError(ctypes.get_errno(), "mlock failed")
        except OSError as error:
            raise BuildError(
                f"the weights cannot be {how} ({error})",
                location="runtime.mapped_weights",
                hint=_MENDS[how],
            ) from error


def pieces(file: Path) -> list[tuple[int, int]]:
    """Start address and length of each mapping of `file` in this process."""
    return [(start, length) for start, _, length in mappings(file)]


def join_pages() -> threading.Thread:
    """Have the kernel join the pages of this process's own memory to huge ones, beside what it does.

    A token reads all weights once, and of pages of 4 KiB each has to be looked up: joined ones save an eighth of the
    time and take no memory. Only what lies there now is joined. BuildError where the kernel cannot (before Linux 6.1).
    """
    _require_joining()
    thread = threading.Timer(JOINED_AFTER_S, _join)
    thread.name, thread.daemon = "huge-pages", True
    thread.start()
    return thread


def _join() -> None:
    for start, _, length, access, name in _maps():
        first, end = -(-start // HUGE_BYTES) * HUGE_BYTES, (start + length) // HUGE_BYTES * HUGE_BYTES
        if first < end and access.startswith("rw-p") and name in ("", "[heap]"):
            try:
                advise(first, end - first, COLLAPSE)
            except OSError:  # some of it was freed meanwhile, or no huge page is to be had: those stay as they are
                continue


def _require_joining() -> None:
    own = ctypes.create_string_buffer(2 * HUGE_BYTES)
    ctypes.memset(own, 1, len(own))  # there is nothing to join where nothing was written yet
    try:
        advise(-(-ctypes.addressof(own) // HUGE_BYTES) * HUGE_BYTES, HUGE_BYTES, COLLAPSE)
    except OSError as error:
        if error.errno == errno.EINVAL:  # else it has no huge page just now
            raise BuildError(
                f"this kernel joins no pages to huge ones ({error})",
                location="runtime.huge_pages",
                hint="Give false, or use Linux 6.1 or newer",
            ) from error


def _maps() -> Iterator[tuple[int, int, int, str, str]]:
    """Of each mapping in this process: start address, offset in its file, length, access, and name of the file."""
    for line in _MAPS.read_text().splitlines():
        addresses, access, offset, _, _, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield start, int(offset, 16), end - start, access, name[0] if name else ""
