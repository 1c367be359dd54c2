"""What lies in a cache, and how the least recently used makes room.

Eviction never touches what a process uses at the moment. Nothing else needs an entry: MLflow holds copies of
the engines of feasible trials, and from those models are registered.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.cache.entry_locks import alone, lock_file
from edgeopt.errors import StoreError

NO_KINDS = ("locks", "uses")
SCRATCH = "scratch"

Inode = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stage, a draft or a scratch folder.

    Attributes:
        used_ns: when it was used last, in ns since 1970.
        blocks: bytes on disk of its files and folders by inode, so that hard links count once; of a
            symbolic link the link itself counts.
    """

    folder: Path
    last_used_ns: int
    blocks: Mapping[Inode, int]

    @property
    def kind(self) -> str:
        return self.folder.parent.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """What an eviction did.

    Attributes:
        in_use: entries that would have gone, had no process used them.
        left_bytes: of the whole cache, on disk.
    """

    evicted: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    freed_bytes: int
    remaining_bytes: int


def list_entries(root: Path) -> list[Entry]:
    """Everything in the cache `root`, the least recently used first; what vanishes meanwhile is left out."""
    folders = [f for kind in _subfolders(root) if kind.name not in NO_KINDS for f in _subfolders(kind)]
    return sorted((e for f in folders if (e := _entry(root, f)) is not None), key=lambda e: e.last_used_ns)


def bytes_on_disk(found: Iterable[Entry]) -> int:
    """Bytes of all `found` together; a file that several hard links share counts once."""
    together: dict[Inode, int] = {}
    for entry in found:
        together |= entry.blocks
    return sum(together.values())


def evict(root: Path, to_bytes: int) -> Eviction:
    """Remove scratch of dead processes, then the least recently used entries until `to_bytes` are left at most.

    Raises StoreError where an entry cannot be removed.
    """
    evicted: list[Entry] = []
    in_use: list[Entry] = []
    with lock_file(root / "locks" / "eviction") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        found = list_entries(root)
        before = left = bytes_on_disk(found)
        links = Counter(inode for entry in found for inode in entry.blocks)
        for entry in sorted(found, key=lambda e: e.kind != SCRATCH):
            if entry.kind != SCRATCH and left <= to_bytes:
                break
            with lock_file(root / "uses" / entry.folder.name) as use:
                if not alone(use):
                    in_use += [entry] if left > to_bytes else []
                    continue
                _evicted(root, entry)
            evicted.append(entry)
            links.subtract(entry.blocks.keys())
            left -= sum(size for inode, size in entry.blocks.items() if not links[inode])
    return Eviction(evicted=tuple(evicted), in_use=tuple(in_use), freed_bytes=before - left, remaining_bytes=left)


def remove(root: Path, folder: Path) -> None:
    """Remove an entry with which the caller is alone; a kill at any moment leaves all of it or scratch."""
    scratch = root / SCRATCH / folder.name
    if folder != scratch:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        folder.rename(scratch)
    shutil.rmtree(scratch)


def _evicted(root: Path, entry: Entry) -> None:
    try:
        if entry.folder.is_dir():  # a draft may have been finished since it was found
            remove(root, entry.folder)
    except OSError as error:
        raise StoreError(
            f"it cannot be removed from the cache ({error.strerror})",
            location=str(entry.folder),
            hint="Make it writable, or remove it by hand",
        ) from error


def _entry(root: Path, folder: Path) -> Entry | None:
    try:
        mark = root / "uses" / folder.name
        last_used_ns = (mark if mark.is_file() else folder).stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return Entry(folder=folder, last_used_ns=last_used_ns, blocks=dict(_blocks(folder)))


def _blocks(path: Path) -> Iterator[tuple[Inode, int]]:
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            try:
                found = Path(folder, name).lstat()
            except FileNotFoundError:
                continue
            yield (found.st_dev, found.st_ino), found.st_blocks * 512


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())
