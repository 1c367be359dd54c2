"""List cache entries and evict the least recently used ones.

Eviction never removes an entry that a process uses. All other entries can be recomputed: MLflow holds copies of the
engines of feasible trials, and models are registered from those copies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.cache.entry_locks import open_lock_file, try_lock_exclusive
from edgeopt.errors import StoreError

LOCK_FOLDERS = ("locks", "uses")
SCRATCH = "scratch"

Inode = tuple[int, int]
"""(device, inode number)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stage, a draft or a scratch folder.

    Attributes:
        last_used_ns: time of the last use, in ns since 1970.
        blocks: bytes on disk by inode, so that hard links count once. A symbolic link counts itself, not its target.
    """

    folder: Path
    last_used_ns: int
    blocks: Mapping[Inode, int]

    @property
    def kind(self) -> str:
        """Return the kind of the stage, `drafts` or `scratch`."""
        return self.folder.parent.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """Result of an eviction.

    Attributes:
        in_use: entries that were due for eviction but are used by a process.
        remaining_bytes: size of the whole cache on disk afterwards.
    """

    evicted: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    freed_bytes: int
    remaining_bytes: int


def list_entries(root: Path) -> list[Entry]:
    """Return all entries of the cache at `root`, least recently used first. Skip entries that are removed meanwhile."""
    folders = [f for kind in _subfolders(root) if kind.name not in LOCK_FOLDERS for f in _subfolders(kind)]
    return sorted((e for f in folders if (e := _read_entry(root, f)) is not None), key=lambda e: e.last_used_ns)


def bytes_on_disk(entries: Iterable[Entry]) -> int:
    """Return the total bytes on disk of `entries`. A file with several hard links counts once."""
    blocks: dict[Inode, int] = {}
    for entry in entries:
        blocks |= entry.blocks
    return sum(blocks.values())


def evict(root: Path, max_bytes: int, *, kind: str = "") -> Eviction:
    """Remove the scratch folders of dead processes, then the least recently used entries down to `max_bytes`.

    With `kind`, only entries of this kind are removed.

    Raises StoreError if an entry cannot be removed.
    """
    evicted: list[Entry] = []
    in_use: list[Entry] = []
    with open_lock_file(root / "locks" / "eviction") as eviction_lock:
        fcntl.flock(eviction_lock, fcntl.LOCK_EX)
        entries = list_entries(root)
        before_bytes = remaining_bytes = bytes_on_disk(entries)
        link_counts = Counter(inode for entry in entries for inode in entry.blocks)
        candidates = [entry for entry in entries if entry.kind == SCRATCH or kind in ("", entry.kind)]
        for entry in sorted(candidates, key=lambda e: e.kind != SCRATCH):
            if entry.kind != SCRATCH and remaining_bytes <= max_bytes:
                break
            with open_lock_file(root / "uses" / entry.folder.name) as use:
                if not try_lock_exclusive(use):
                    if remaining_bytes > max_bytes:
                        in_use.append(entry)
                    continue
                _evict_entry(root, entry)
            evicted.append(entry)
            link_counts.subtract(entry.blocks.keys())
            remaining_bytes -= sum(size for inode, size in entry.blocks.items() if not link_counts[inode])
    return Eviction(
        evicted=tuple(evicted),
        in_use=tuple(in_use),
        freed_bytes=before_bytes - remaining_bytes,
        remaining_bytes=remaining_bytes,
    )


def remove_entry(root: Path, folder: Path) -> None:
    """Remove an entry that the caller has locked exclusively.

    The entry is renamed into the scratch folder first, so a kill at any moment never leaves a partial entry.
    """
    scratch = root / SCRATCH / folder.name
    if folder != scratch:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
        folder.rename(scratch)
    shutil.rmtree(scratch)


def _evict_entry(root: Path, entry: Entry) -> None:
    try:
        if entry.folder.is_dir():  # a draft may have been finished and removed since it was listed
            remove_entry(root, entry.folder)
    except OSError as error:
        raise StoreError(
            f"the cache entry cannot be removed ({error.strerror})",
            location=str(entry.folder),
            hint="Make it writable, or remove it manually",
        ) from error


def _read_entry(root: Path, folder: Path) -> Entry | None:
    """Return the entry at `folder`, or None if it no longer exists."""
    try:
        use = root / "uses" / folder.name
        last_used_ns = (use if use.is_file() else folder).stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return Entry(folder=folder, last_used_ns=last_used_ns, blocks=dict(_list_blocks(folder)))


def _list_blocks(path: Path) -> Iterator[tuple[Inode, int]]:
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            try:
                status = Path(folder, name).lstat()
            except FileNotFoundError:
                continue
            yield (status.st_dev, status.st_ino), status.st_blocks * 512


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())
