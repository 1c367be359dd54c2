"""Control which weights of a process are resident: mapped files, released pages and huge pages.

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

MADV_WILLNEED, MADV_DONTNEED, MADV_POPULATE_READ, MADV_COLLAPSE = 3, 4, 22, 25
"""Constants of asm-generic/mman-common.h."""
HUGE_PAGE_BYTES = 2 * 2**20
COLLAPSE_DELAY_S = 0.2
"""Seconds between opening an engine and collapsing pages, which occupies a core and would delay the first token."""
_HINTS = {
    "prefaulted": "Use on_demand, or Linux 5.14 or newer",
    "locked": "Use prefaulted, or raise the limit of locked memory: ulimit -l",
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_MAPS = Path("/proc/self/maps")


def madvise(address: int, length: int, advice: int) -> None:
    """Call madvise(2). Raises OSError."""
    if _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice):
        raise OSError(ctypes.get_errno(), f"madvise({advice}) failed")


def release_pages(address: int, length: int) -> None:
    """Release mapped pages of a file from memory; the file keeps their content. Raises OSError."""
    madvise(address, length, MADV_DONTNEED)


def file_mappings(file: Path) -> list[tuple[int, int, int]]:
    """Return start address, offset in the file and length of each mapping of `file` in this process."""
    path = str(file.resolve())
    return [(start, offset, length) for start, offset, length, _, mapped in _mappings() if mapped == path]


def mapped_regions(file: Path) -> list[tuple[int, int]]:
    """Return start address and length of each mapping of `file` in this process."""
    return [(start, length) for start, _, length in file_mappings(file)]


def apply_memory_options(weights: Path, options: SessionOptions) -> None:
    """Apply `packed_on_disk` and `huge_pages` to an engine that has just been opened from the file `weights`.

    Opening an engine with prepacked weights also reads the original ones. This releases both; only the prepacked ones
    are read again. Raises BuildError if the kernel does not support `huge_pages`.
    """
    if options.packed_on_disk:
        for start, length in mapped_regions(weights):
            release_pages(start, length)
    if options.huge_pages:
        collapse_huge_pages()


def make_resident(regions: Iterable[tuple[int, int]], mode: MappedWeights) -> None:
    """Prefault or lock mapped weights, given as start address and length of each region.

    Raises BuildError if the kernel refuses.
    """
    if mode == "on_demand":
        return
    for start, length in regions:
        try:
            if mode == "prefaulted":
                madvise(start, length, MADV_POPULATE_READ)
            elif _LIBC.mlock(ctypes.c_void_p(start), ctypes.c_size_t(length)):
                raise OSError(ctypes.get_errno(), "mlock failed")
        except OSError as error:
            raise BuildError(
                f"the weights cannot be {mode} ({error})",
                location="runtime.mapped_weights",
                hint=_HINTS[mode],
            ) from error


def collapse_huge_pages() -> threading.Thread:
    """Start a thread that collapses the present private memory of this process into huge pages.

    Each token reads all weights once, and each page of 4 KiB costs an address lookup. Huge pages save an eighth of the
    time and need no further memory. Raises BuildError if the kernel does not support it (before Linux 6.1).
    """
    _require_collapse_support()
    thread = threading.Timer(COLLAPSE_DELAY_S, _collapse_private_memory)
    thread.name, thread.daemon = "huge-pages", True
    thread.start()
    return thread


def _collapse_private_memory() -> None:
    for start, _, length, access, path in _mappings():
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        end = (start + length) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if first < end and access.startswith("rw-p") and path in ("", "[heap]"):
            try:
                madvise(first, end - first, MADV_COLLAPSE)
            except OSError:  # memory was freed meanwhile or no huge page is free: these pages stay as they are
                continue


def _require_collapse_support() -> None:
    buffer = ctypes.create_string_buffer(2 * HUGE_PAGE_BYTES)
    ctypes.memset(buffer, 1, len(buffer))  # pages exist only once they are written
    try:
        madvise(-(-ctypes.addressof(buffer) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, MADV_COLLAPSE)
    except OSError as error:
        if error.errno == errno.EINVAL:  # other errors mean that no huge page is free at the moment
            raise BuildError(
                f"this kernel cannot collapse pages into huge pages ({error})",
                location="runtime.huge_pages",
                hint="Use false, or Linux 6.1 or newer",
            ) from error


def _mappings() -> Iterator[tuple[int, int, int, str, str]]:
    """Yield start address, offset in the file, length, access and path of each mapping of this process."""
    for line in _MAPS.read_text().splitlines():
        addresses, access, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield start, int(offset, 16), end - start, access, path[0] if path else ""
