"""What the cache forgets, in which order, and what it keeps whatever the limit; with processes that really die."""

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
LONG_S = 30.0


def filled(folder: Path, size: int = SIZE) -> None:
    (folder / "out").write_bytes(os.urandom(size))


def stage(store: StageCache, name: object, size: int = SIZE) -> Path:
    return store.get_or_create("k", name, lambda folder: filled(folder, size))


def names(root: Path, kind: str = "k") -> set[str]:
    return {entry.folder.name for entry in list_entries(root) if entry.kind == kind}


@pytest.fixture
def one(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes on disk of one entry of SIZE bytes."""
    return size_of_one(tmp_path_factory)


def size_of_one(tmp_path_factory: pytest.TempPathFactory) -> int:
    store = StageCache(tmp_path_factory.mktemp("one"))
    stage(store, 0)
    return bytes_on_disk(list_entries(store.root))


@contextlib.contextmanager
def process(target: Callable[[], None], ready: Path) -> Iterator[BaseProcess]:
    """Another process that runs `target`, from when it has made the file `ready`; killed at the end."""
    started = FORK.Process(target=target)
    started.start()
    try:
        wait_for(ready)
        yield started
    finally:
        started.kill()
        started.join()


def wait_for(path: Path) -> None:
    end = time.monotonic() + LONG_S
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


# order and limit


def test_the_least_recently_used_entry_goes_first(tmp_path: Path, one: int) -> None:
    store = StageCache(tmp_path, limit_bytes=3 * one)
    first, second, third = (stage(store, name) for name in "abc")
    assert stage(store, "a") == first, "it is used again"
    fourth = stage(store, "d")
    assert names(tmp_path) == {first.name, third.name, fourth.name}
    assert not second.exists()


@settings(max_examples=30)
@given(asked=st.lists(st.integers(0, 5), max_size=25), room=st.integers(1, 4))
def test_the_cache_forgets_as_a_plain_least_recently_used_list_does(
    tmp_path_factory: pytest.TempPathFactory, asked: list[int], room: int
) -> None:
    store = StageCache(tmp_path_factory.mktemp("store"), limit_bytes=room * size_of_one(tmp_path_factory))
    known: OrderedDict[int, None] = OrderedDict()
    made: list[int] = []
    expected: list[int] = []
    for name in asked:
        store.get_or_create("k", name, lambda folder, name=name: (made.append(name), filled(folder))[1])  # type: ignore[misc]
        if name not in known:
            expected.append(name)
        known[name] = None
        known.move_to_end(name)
        if len(known) > room:
            known.popitem(last=False)
        assert made == expected
        assert len(names(store.root)) == len(known)


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 300_000), max_size=12))
def test_the_limit_is_kept_after_each_stage(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    store = StageCache(tmp_path_factory.mktemp("store"), limit_bytes=500_000)
    for number, size in enumerate(sizes):
        made = stage(store, number, size)
        assert bytes_on_disk(list_entries(store.root)) <= 500_000
        assert made.exists(), "what fits is not evicted by its own arrival"


def test_without_a_limit_nothing_is_evicted(tmp_path: Path) -> None:
    store = StageCache(tmp_path)
    for name in range(20):
        stage(store, name)
    assert len(names(tmp_path)) == 20


def test_hard_links_count_once_and_symbolic_links_as_themselves(tmp_path: Path, one: int) -> None:
    store = StageCache(tmp_path / "cache")
    (tmp_path / "weights").write_bytes(os.urandom(SIZE))
    first = stage(store, "a")
    second = store.get_or_create("k", "b", lambda folder: os.link(first / "out", folder / "out"))
    store.get_or_create("k", "c", lambda folder: (folder / "out").symlink_to(tmp_path / "weights"))
    assert one < bytes_on_disk(list_entries(store.root)) < one + SIZE
    done = evict(store.root, one)
    assert [entry.folder for entry in done.evicted] == [first, second], "the first alone frees no more than a folder"
    assert done.remaining_bytes == bytes_on_disk(list_entries(store.root)) < SIZE
    assert done.freed_bytes >= SIZE


def test_entries_of_an_earlier_version_without_a_note_of_use_are_as_old_as_their_folder(tmp_path: Path) -> None:
    store = StageCache(tmp_path)
    new = stage(store, "new")
    (tmp_path / "k" / "old").mkdir()
    os.utime(tmp_path / "k" / "old", (1, 1))
    assert [e.folder.name for e in list_entries(tmp_path)] == ["old", new.name]
    assert [e.folder.name for e in evict(tmp_path, 0).evicted] == ["old", new.name]


# what is in use


def test_what_a_block_holds_stays_until_it_ends(tmp_path: Path) -> None:
    store = StageCache(tmp_path, limit_bytes=0)
    told: list[str] = []
    with store.protect(told.append):
        held = [stage(store, name) for name in range(3)]
        assert [stage(store, name) for name in range(3)] == held
        assert all((folder / "out").stat().st_size == SIZE for folder in held)
        assert [e.folder for e in evict(tmp_path, 0).in_use] == held
    assert len(told) == 1, "it is said once"
    assert "above its limit" in told[0]
    assert [e.folder for e in evict(tmp_path, 0).evicted] == held


def test_a_stage_made_again_in_one_block_after_it_failed_is_whole(tmp_path: Path) -> None:
    store = StageCache(tmp_path, limit_bytes=0)

    def fails(folder: Path) -> None:
        filled(folder)
        raise ValueError("no")

    with store.protect():
        with pytest.raises(ValueError, match="no"):
            store.get_or_create("k", 1, fails)
        assert (stage(store, 1) / "out").stat().st_size == SIZE


def test_what_a_producer_asked_for_stays_until_it_is_done(tmp_path: Path) -> None:
    store = StageCache(tmp_path, limit_bytes=0)

    def nested(folder: Path) -> None:
        inner = [stage(store, name) for name in ("inner", "other")]
        evict(tmp_path, 0)
        for path in inner:
            shutil.copyfile(path / "out", folder / path.name)

    with store.protect():
        assert len(list(store.get_or_create("k", "outer", nested).iterdir())) == 2
    StageCache(tmp_path, limit_bytes=0).get_or_create("k", "outer", nested)  # and the same outside a block
    assert len(evict(tmp_path, 0).evicted) == 3


def test_what_a_live_process_uses_stays_and_goes_after_it_was_killed(tmp_path: Path) -> None:
    root, ready = tmp_path / "cache", tmp_path / "ready"

    def use() -> None:
        store = StageCache(root)
        with store.protect():
            stage(store, "used")
            ready.touch()
            time.sleep(LONG_S)

    with process(use, ready) as other:
        unused = stage(StageCache(root), "unused")
        done = evict(root, 0)
        assert [e.folder for e in done.evicted] == [unused]
        (kept,) = done.in_use
        assert (kept.folder / "out").stat().st_size == SIZE
        os.kill(other.pid or 0, signal.SIGKILL)
        other.join()
        assert [e.folder for e in evict(root, 0).evicted] == [kept.folder]


def test_eviction_does_not_touch_a_stage_that_is_being_produced(tmp_path: Path) -> None:
    root, ready, go = tmp_path / "cache", tmp_path / "ready", tmp_path / "go"

    def produce(folder: Path) -> None:
        filled(folder)
        ready.touch()
        wait_for(go)
        shutil.copyfile(folder / "out", folder / "copy")

    with process(lambda: exit(StageCache(root).get_or_create("k", 1, produce) is None), ready) as other:
        done = evict(root, 0)
        assert [e.kind for e in done.in_use] == ["scratch"]
        go.touch()
        other.join(LONG_S)
        assert other.exitcode == 0
    made = StageCache(root).get_or_create("k", 1, lambda _: pytest.fail("it is there"))
    assert {p.name for p in made.iterdir()} == {"out", "copy"}


def test_scratch_of_a_killed_producer_goes_although_the_limit_is_kept(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        filled(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    store = StageCache(tmp_path)
    other = FORK.Process(target=store.get_or_create, args=("k", 1, dies))
    other.start()
    other.join(LONG_S)
    kept = stage(store, 2)
    assert len(names(tmp_path, "scratch")) == 1
    assert [e.kind for e in evict(tmp_path, 10**9).evicted] == ["scratch"]
    assert kept.exists()


def test_a_kill_while_an_entry_is_removed_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StageCache(tmp_path)
    made = stage(store, 1)

    def half(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "out").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def dies() -> None:
        shutil.rmtree = half  # type: ignore[assignment]
        evict(tmp_path, 0)

    other = FORK.Process(target=dies)
    other.start()
    other.join(LONG_S)
    assert other.exitcode == -signal.SIGKILL
    assert not made.exists()
    assert (stage(store, 1) / "out").stat().st_size == SIZE
    assert names(tmp_path, "scratch") == set()


def test_an_invalid_stage_that_another_process_uses_is_taken_as_it_is(tmp_path: Path) -> None:
    root, ready = tmp_path / "cache", tmp_path / "ready"

    def use() -> None:
        store = StageCache(root)
        with store.protect():
            stage(store, 1)
            ready.touch()
            time.sleep(LONG_S)

    def again(valid: bool) -> bytes:
        made = StageCache(root).get_or_create("k", 1, lambda f: (f / "out").write_text("new") and None, lambda _: valid)
        return (made / "out").read_bytes()

    with process(use, ready):
        assert len(again(False)) == SIZE
    assert again(False) == b"new"
    assert again(True) == b"new"


def test_who_waits_for_an_invalid_stage_to_be_made_anew_does_not_keep_it(tmp_path: Path) -> None:
    root, ready = tmp_path / "cache", tmp_path / "ready"
    made = stage(StageCache(root), 1)

    def invalid(_: Path) -> bool:
        ready.touch()
        return False

    with (root / "locks" / made.name).open("a") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        with process(lambda: exit(StageCache(root).get_or_create("k", 1, filled, invalid) is None), ready):
            end = time.monotonic() + LONG_S
            while not evict(root, 0).evicted:
                assert time.monotonic() < end


def test_a_draft_in_use_stays_and_an_abandoned_one_goes_in_its_turn(tmp_path: Path) -> None:
    store = StageCache(tmp_path)
    with contextlib.suppress(ValueError), store.resumable_folder(1) as draft:
        filled(draft)
        assert [e.folder for e in evict(tmp_path, 0).in_use] == [draft]
        raise ValueError("the work fails")
    newer = stage(store, 1)
    assert [e.folder for e in evict(tmp_path, bytes_on_disk(list_entries(tmp_path)) - 1).evicted] == [draft]
    assert newer.exists()
    with store.resumable_folder(1) as again:
        assert not list(again.iterdir())


def test_processes_that_make_and_use_an_entry_while_others_evict_it_never_see_half_of_it(tmp_path: Path) -> None:
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
            store = StageCache(root, limit_bytes=0)
            with store.protect():
                for name in range(2):
                    made = store.get_or_create("k", name, produce)
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
        other.join(LONG_S)
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert int((tmp_path / "evicted").read_text()) > 3
    assert all(int(path.read_text()) > 3 for path in tmp_path.glob("used-*"))


def test_two_evictions_at_once_evict_no_more_than_one(tmp_path: Path, one: int) -> None:
    store = StageCache(tmp_path)
    for name in range(12):
        stage(store, name)
    others = [FORK.Process(target=evict, args=(tmp_path, 8 * one)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(LONG_S)
    assert len(names(tmp_path)) == 8


# what lies in the cache by its path


def test_a_path_in_the_cache_is_kept_while_it_is_used(tmp_path: Path) -> None:
    made = stage(StageCache(tmp_path), 1)
    with protect_paths([made / "out", made]) as there:
        assert there
        assert len(evict(tmp_path, 0).in_use) == 1
    assert len(evict(tmp_path, 0).evicted) == 1
    with protect_paths([made]) as there:
        assert not there


def test_a_path_outside_a_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    with protect_paths([tmp_path / "engine"]) as there:
        assert there
    with protect_paths([tmp_path / "engine", tmp_path / "gone"]) as there:
        assert not there
    assert [p.name for p in tmp_path.rglob("*")] == ["engine"]


# disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, code: int) -> None:
    store = StageCache(tmp_path)
    kept = stage(store, "kept")

    def full(folder: Path) -> None:
        filled(folder)
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError, match="stage k cannot be written") as caught:
        store.get_or_create("k", 1, full)
    assert "edgeopt cache prune" in caught.value.hint
    assert names(tmp_path) == {kept.name}
    assert names(tmp_path, "scratch") == set()
    assert (stage(store, 1) / "out").stat().st_size == SIZE


def test_a_full_disk_without_room_for_a_lock_is_told_with_the_command_that_frees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StageCache(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        stage(store, 1)
    assert caught.value.hint == "Free space: edgeopt cache prune"
    assert caught.value.location == str(tmp_path)


def test_an_entry_that_cannot_be_removed_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(StageCache(tmp_path), 1)

    def refuses(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(StoreError, match="cannot be removed") as caught:
        evict(tmp_path, 0)
    assert caught.value.location == str(made)
    assert made.exists()


def test_an_empty_cache_evicts_nothing(tmp_path: Path) -> None:
    StageCache(tmp_path)
    assert evict(tmp_path, 0) == Eviction(evicted=(), in_use=(), freed_bytes=0, remaining_bytes=0)
