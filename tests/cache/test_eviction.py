"""Check the order of eviction and that entries in use stay, also when processes are killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.cache import StageCache
from edgeopt.cache.entry_locks import protect_paths
from edgeopt.cache.eviction import Eviction, bytes_on_disk, evict, list_entries
from edgeopt.errors import StoreError

FORK = multiprocessing.get_context("fork")
SIZE = 32 * 1024
TIMEOUT_S = 30.0


def fill(folder: Path, size: int = SIZE) -> None:
    (folder / "out").write_bytes(os.urandom(size))


def create_stage(cache: StageCache, name: object, size: int = SIZE) -> Path:
    return cache.get_or_create("k", name, lambda folder: fill(folder, size))


def names(root: Path, kind: str = "k") -> set[str]:
    return {entry.folder.name for entry in list_entries(root) if entry.kind == kind}


@pytest.fixture
def entry_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return the bytes on disk of an entry with a file of SIZE bytes."""
    return measure_entry_bytes(tmp_path_factory)


def measure_entry_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    cache = StageCache(tmp_path_factory.mktemp("cache"))
    create_stage(cache, 0)
    return bytes_on_disk(list_entries(cache.root))


@contextlib.contextmanager
def run_process(target: Callable[[], None], ready: Path) -> Iterator[BaseProcess]:
    """Run `target` in another process and yield it once the file `ready` exists; kill the process at the end."""
    process = FORK.Process(target=target)
    process.start()
    try:
        wait_for(ready)
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(path: Path) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


# order and limit


def test_least_recently_used_entry_is_evicted_first(tmp_path: Path, entry_bytes: int) -> None:
    cache = StageCache(tmp_path, limit_bytes=3 * entry_bytes)
    first, second, third = (create_stage(cache, name) for name in "abc")
    assert create_stage(cache, "a") == first, "this use makes the entry the most recent one"
    fourth = create_stage(cache, "d")
    assert names(tmp_path) == {first.name, third.name, fourth.name}
    assert not second.exists()


@settings(max_examples=30)
@given(requests=st.lists(st.integers(0, 5), max_size=25), capacity=st.integers(1, 4))
def test_eviction_matches_an_lru_model(
    tmp_path_factory: pytest.TempPathFactory, requests: list[int], capacity: int
) -> None:
    cache = StageCache(tmp_path_factory.mktemp("cache"), limit_bytes=capacity * measure_entry_bytes(tmp_path_factory))
    model: OrderedDict[int, None] = OrderedDict()
    produced: list[int] = []
    expected: list[int] = []
    for name in requests:
        cache.get_or_create("k", name, lambda folder, name=name: (produced.append(name), fill(folder))[1])  # type: ignore[misc]
        if name not in model:
            expected.append(name)
        model[name] = None
        model.move_to_end(name)
        if len(model) > capacity:
            model.popitem(last=False)
        assert produced == expected
        assert len(names(cache.root)) == len(model)


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 300_000), max_size=12))
def test_limit_holds_after_each_stage(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    cache = StageCache(tmp_path_factory.mktemp("cache"), limit_bytes=500_000)
    for number, size in enumerate(sizes):
        made = create_stage(cache, number, size)
        assert bytes_on_disk(list_entries(cache.root)) <= 500_000
        assert made.exists(), "a new entry that fits is not evicted"


def test_no_limit_disables_eviction(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    for name in range(20):
        create_stage(cache, name)
    assert len(names(tmp_path)) == 20


def test_hard_links_count_once_and_symlinks_as_links(tmp_path: Path, entry_bytes: int) -> None:
    cache = StageCache(tmp_path / "cache")
    (tmp_path / "weights").write_bytes(os.urandom(SIZE))
    first = create_stage(cache, "a")
    second = cache.get_or_create("k", "b", lambda folder: os.link(first / "out", folder / "out"))
    cache.get_or_create("k", "c", lambda folder: (folder / "out").symlink_to(tmp_path / "weights"))
    assert entry_bytes < bytes_on_disk(list_entries(cache.root)) < entry_bytes + SIZE
    eviction = evict(cache.root, entry_bytes)
    assert [entry.folder for entry in eviction.evicted] == [first, second], (
        "evicting the first alone frees only its folder"
    )
    assert eviction.remaining_bytes == bytes_on_disk(list_entries(cache.root)) < SIZE
    assert eviction.freed_bytes >= SIZE


def test_entry_without_recorded_use_ages_by_folder(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    new = create_stage(cache, "new")
    (tmp_path / "k" / "old").mkdir()
    os.utime(tmp_path / "k" / "old", (1, 1))
    assert [e.folder.name for e in list_entries(tmp_path)] == ["old", new.name]
    assert [e.folder.name for e in evict(tmp_path, 0).evicted] == ["old", new.name]


# entries in use


def test_protected_entries_stay_until_block_ends(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, limit_bytes=0)
    lines: list[str] = []
    with cache.protect(lines.append):
        protected = [create_stage(cache, name) for name in range(3)]
        assert [create_stage(cache, name) for name in range(3)] == protected
        assert all((folder / "out").stat().st_size == SIZE for folder in protected)
        assert [e.folder for e in evict(tmp_path, 0).in_use] == protected
    assert len(lines) == 1, "reported once"
    assert "exceeds its limit" in lines[0]
    assert [e.folder for e in evict(tmp_path, 0).evicted] == protected


def test_stage_retried_in_one_block_is_complete(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, limit_bytes=0)

    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("failed")

    with cache.protect():
        with pytest.raises(ValueError, match="failed"):
            cache.get_or_create("k", 1, fail)
        assert (create_stage(cache, 1) / "out").stat().st_size == SIZE


def test_inputs_of_a_producer_stay_until_it_ends(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, limit_bytes=0)

    def nested(folder: Path) -> None:
        inner = [create_stage(cache, name) for name in ("inner", "other")]
        evict(tmp_path, 0)
        for path in inner:
            shutil.copyfile(path / "out", folder / path.name)

    with cache.protect():
        assert len(list(cache.get_or_create("k", "outer", nested).iterdir())) == 2
    StageCache(tmp_path, limit_bytes=0).get_or_create("k", "outer", nested)  # also without an explicit block
    assert len(evict(tmp_path, 0).evicted) == 3


def test_kill_releases_entries_of_a_process(tmp_path: Path) -> None:
    root, ready = tmp_path / "cache", tmp_path / "ready"

    def use() -> None:
        cache = StageCache(root)
        with cache.protect():
            create_stage(cache, "used")
            ready.touch()
            time.sleep(TIMEOUT_S)

    with run_process(use, ready) as other:
        unused = create_stage(StageCache(root), "unused")
        eviction = evict(root, 0)
        assert [e.folder for e in eviction.evicted] == [unused]
        (kept,) = eviction.in_use
        assert (kept.folder / "out").stat().st_size == SIZE
        os.kill(other.pid or 0, signal.SIGKILL)
        other.join()
        assert [e.folder for e in evict(root, 0).evicted] == [kept.folder]


def test_stage_being_produced_is_not_evicted(tmp_path: Path) -> None:
    root, ready, go = tmp_path / "cache", tmp_path / "ready", tmp_path / "go"

    def produce(folder: Path) -> None:
        fill(folder)
        ready.touch()
        wait_for(go)
        shutil.copyfile(folder / "out", folder / "copy")

    with run_process(lambda: exit(StageCache(root).get_or_create("k", 1, produce) is None), ready) as other:
        eviction = evict(root, 0)
        assert [e.kind for e in eviction.in_use] == ["scratch"]
        go.touch()
        other.join(TIMEOUT_S)
        assert other.exitcode == 0
    made = StageCache(root).get_or_create("k", 1, lambda _: pytest.fail("the stage exists"))
    assert {p.name for p in made.iterdir()} == {"out", "copy"}


def test_scratch_of_killed_producer_is_always_removed(tmp_path: Path) -> None:
    def die(folder: Path) -> None:
        fill(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    cache = StageCache(tmp_path)
    other = FORK.Process(target=cache.get_or_create, args=("k", 1, die))
    other.start()
    other.join(TIMEOUT_S)
    kept = create_stage(cache, 2)
    assert len(names(tmp_path, "scratch")) == 1
    assert [e.kind for e in evict(tmp_path, 10**9).evicted] == ["scratch"]
    assert kept.exists()


def test_kill_during_removal_leaves_no_partial_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(tmp_path)
    made = create_stage(cache, 1)

    def remove_partially(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "out").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def die() -> None:
        shutil.rmtree = remove_partially  # type: ignore[assignment]
        evict(tmp_path, 0)

    other = FORK.Process(target=die)
    other.start()
    other.join(TIMEOUT_S)
    assert other.exitcode == -signal.SIGKILL
    assert not made.exists()
    assert (create_stage(cache, 1) / "out").stat().st_size == SIZE
    assert names(tmp_path, "scratch") == set()


def test_invalid_stage_in_use_is_returned_unchanged(tmp_path: Path) -> None:
    root, ready = tmp_path / "cache", tmp_path / "ready"

    def use() -> None:
        cache = StageCache(root)
        with cache.protect():
            create_stage(cache, 1)
            ready.touch()
            time.sleep(TIMEOUT_S)

    def request(is_valid: bool) -> bytes:
        made = StageCache(root).get_or_create(
            "k", 1, lambda f: (f / "out").write_text("new") and None, lambda _: is_valid
        )
        return (made / "out").read_bytes()

    with run_process(use, ready):
        assert len(request(False)) == SIZE
    assert request(False) == b"new"
    assert request(True) == b"new"


def test_waiting_for_reproduction_does_not_block_eviction(tmp_path: Path) -> None:
    root, ready = tmp_path / "cache", tmp_path / "ready"
    made = create_stage(StageCache(root), 1)

    def invalid(_: Path) -> bool:
        ready.touch()
        return False

    with (root / "locks" / made.name).open("a") as producer_lock:
        fcntl.flock(producer_lock, fcntl.LOCK_EX)
        with run_process(lambda: exit(StageCache(root).get_or_create("k", 1, fill, invalid) is None), ready):
            end = time.monotonic() + TIMEOUT_S
            while not evict(root, 0).evicted:
                assert time.monotonic() < end


def test_draft_is_evicted_only_after_use(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    with contextlib.suppress(ValueError), cache.resumable_folder(1) as draft:
        fill(draft)
        assert [e.folder for e in evict(tmp_path, 0).in_use] == [draft]
        raise ValueError("failed")
    newer = create_stage(cache, 1)
    assert [e.folder for e in evict(tmp_path, bytes_on_disk(list_entries(tmp_path)) - 1).evicted] == [draft]
    assert newer.exists()
    with cache.resumable_folder(1) as recreated:
        assert not list(recreated.iterdir())


def test_concurrent_use_and_eviction_never_expose_partial_entries(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    StageCache(root)
    end = time.monotonic() + 2.5

    def produce(folder: Path) -> None:
        content = os.urandom(64)
        for number in range(4):
            (folder / f"{number}").write_bytes(content)

    def use() -> None:
        used = 0
        while time.monotonic() < end:
            cache = StageCache(root, limit_bytes=0)
            with cache.protect():
                for name in range(2):
                    made = cache.get_or_create("k", name, produce)
                    assert len({(made / f"{number}").read_bytes() for number in range(4)}) == 1
                    used += 1
        (tmp_path / f"used-{os.getpid()}").write_text(str(used))

    def prune() -> None:
        evicted = 0
        while time.monotonic() < end:
            evicted += len(evict(root, 0).evicted)
        (tmp_path / "evicted").write_text(str(evicted))

    others = [FORK.Process(target=target) for target in (use, use, prune)]
    for other in others:
        other.start()
    for other in others:
        other.join(TIMEOUT_S)
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert int((tmp_path / "evicted").read_text()) > 3
    assert all(int(path.read_text()) > 3 for path in tmp_path.glob("used-*"))


def test_concurrent_evictions_evict_no_more_than_one(tmp_path: Path, entry_bytes: int) -> None:
    cache = StageCache(tmp_path)
    for name in range(12):
        create_stage(cache, name)
    others = [FORK.Process(target=evict, args=(tmp_path, 8 * entry_bytes)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(TIMEOUT_S)
    assert len(names(tmp_path)) == 8


# protection by path


def test_protected_path_is_not_evicted(tmp_path: Path) -> None:
    made = create_stage(StageCache(tmp_path), 1)
    with protect_paths([made / "out", made]) as exist:
        assert exist
        assert len(evict(tmp_path, 0).in_use) == 1
    assert len(evict(tmp_path, 0).evicted) == 1
    with protect_paths([made]) as exist:
        assert not exist


def test_path_outside_cache_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    with protect_paths([tmp_path / "engine"]) as exist:
        assert exist
    with protect_paths([tmp_path / "engine", tmp_path / "gone"]) as exist:
        assert not exist
    assert [p.name for p in tmp_path.rglob("*")] == ["engine"]


# disk errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_raises_store_error_and_keeps_entries(tmp_path: Path, code: int) -> None:
    cache = StageCache(tmp_path)
    kept = create_stage(cache, "kept")

    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError, match="stage k cannot be written") as caught:
        cache.get_or_create("k", 1, full)
    assert "edgeopt cache prune" in caught.value.hint
    assert names(tmp_path) == {kept.name}
    assert names(tmp_path, "scratch") == set()
    assert (create_stage(cache, 1) / "out").stat().st_size == SIZE


def test_full_disk_hint_names_prune_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        create_stage(cache, 1)
    assert caught.value.hint == "Free space with `edgeopt cache prune`"
    assert caught.value.location == str(tmp_path)


def test_unremovable_entry_raises_error_with_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create_stage(StageCache(tmp_path), 1)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match="cannot be removed") as caught:
        evict(tmp_path, 0)
    assert caught.value.location == str(made)
    assert made.exists()


def test_empty_cache_evicts_nothing(tmp_path: Path) -> None:
    StageCache(tmp_path)
    assert evict(tmp_path, 0) == Eviction(evicted=(), in_use=(), freed_bytes=0, remaining_bytes=0)
