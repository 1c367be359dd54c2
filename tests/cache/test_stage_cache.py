from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeopt
from edgeopt.cache import StageCache
from edgeopt.errors import StepError, StoreError

FORK = multiprocessing.get_context("fork")


class Writer:
    """Producer that writes one file and counts its calls."""

    def __init__(self, text: str) -> None:
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> None:
        assert not list(folder.iterdir()), "a producer receives an empty folder"
        self.calls += 1
        (folder / "out").write_text(self.text)


def list_stages(cache: StageCache, kind: str = "k") -> list[Path]:
    folder = cache.root / kind
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_equal_inputs_are_produced_once(tmp_path: Path) -> None:
    writer = Writer("a")
    first = StageCache(tmp_path).get_or_create("k", {"x": [1, 2.5, None], "y": "é"}, writer)
    second = StageCache(tmp_path).get_or_create("k", {"y": "é", "x": [1, 2.5, None]}, writer)
    assert first == second
    assert (first / "out").read_text() == "a"
    assert writer.calls == 1


@settings(max_examples=20)
@given(
    inputs=st.lists(
        st.tuples(st.sampled_from(["k", "l"]), st.lists(st.integers(0, 3), max_size=3)), min_size=2, unique_by=repr
    )
)
def test_different_inputs_and_kinds_have_different_stages(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[tuple[str, list[int]]]
) -> None:
    cache = StageCache(tmp_path_factory.mktemp("cache"))
    folders = {cache.get_or_create(kind, data, Writer(repr(data))) for kind, data in inputs}
    assert len(folders) == len(inputs)


def test_failed_producer_leaves_no_stage(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "partial").write_text("partial")
        raise StepError("failed")

    with pytest.raises(StepError, match="failed"):
        cache.get_or_create("k", 1, fail)
    assert not list_stages(cache)
    assert not list((cache.root / "scratch").iterdir()), "the scratch folder is removed"
    assert (cache.get_or_create("k", 1, Writer("complete")) / "out").read_text() == "complete"


def test_interrupted_producer_leaves_no_stage(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)

    def interrupt(folder: Path) -> None:
        (folder / "partial").write_text("partial")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_create("k", 1, interrupt)
    assert not list_stages(cache)


def kill_self(folder: Path) -> None:
    (folder / "out").write_text("partial")
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_producer_leaves_no_stage_or_lock(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    process = FORK.Process(target=cache.get_or_create, args=("k", 1, kill_self))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not list_stages(cache)
    folder = StageCache(tmp_path).get_or_create("k", 1, Writer("complete"))
    assert [p.name for p in folder.iterdir()] == ["out"]
    assert (folder / "out").read_text() == "complete"
    assert list((tmp_path / "scratch").iterdir()) == []


def produce_slowly(folder: Path) -> None:
    with (folder.parent.parent / "calls").open("a") as calls:
        calls.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    (folder / "out").write_text("slow")


def test_racing_processes_produce_once(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    racers = [FORK.Process(target=cache.get_or_create, args=("k", "same", produce_slowly)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert len(list_stages(cache)) == 1


def test_nested_stages_do_not_deadlock(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)

    def nested(folder: Path) -> None:
        inner = cache.get_or_create("k", "inner", Writer("inner"))
        (folder / "out").write_text((inner / "out").read_text())

    assert (cache.get_or_create("k", "outer", nested) / "out").read_text() == "inner"


def test_invalid_stage_is_reproduced_and_valid_one_kept(tmp_path: Path) -> None:
    cache, writer = StageCache(tmp_path), Writer("good")
    cache.get_or_create("k", 1, Writer("bad"))

    def is_valid(folder: Path) -> bool:
        return (folder / "out").read_text() == "good"

    assert (cache.get_or_create("k", 1, writer, is_valid) / "out").read_text() == "good"
    cache.get_or_create("k", 1, writer, is_valid)
    assert writer.calls == 1


def test_stage_that_stays_invalid_is_returned(tmp_path: Path) -> None:
    cache, noisy = StageCache(tmp_path), Writer("noisy")
    for calls in (1, 2):
        assert (cache.get_or_create("k", 1, noisy, lambda _: False) / "out").read_text() == "noisy"
        assert noisy.calls == calls


@pytest.mark.parametrize("below", ["file", "file/state"])
def test_root_that_is_a_file_raises_store_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written") as caught:
        StageCache(tmp_path / below)
    assert caught.value.location == str(tmp_path / below)
    assert "state" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_root_without_write_permission_raises_store_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        StageCache(tmp_path / "state")


def test_read_only_file_system_raises_store_error() -> None:
    if not Path("/sys/kernel").is_dir():
        pytest.skip("needs a file system that is read-only even for root")
    with pytest.raises(StoreError, match="cannot be written"):
        StageCache(Path("/sys/kernel/edgeopt"))


def test_removed_root_raises_store_error(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "state")
    (tmp_path / "state" / "scratch").rmdir()
    (tmp_path / "state").rmdir()
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        cache.get_or_create("k", 1, Writer("a"))


def test_resumable_folder_survives_failure_until_completion(tmp_path):
    cache = StageCache(tmp_path)
    with contextlib.suppress(RuntimeError), cache.resumable_folder(["training", 1]) as folder:
        (folder / "state").write_text("partial")
        raise RuntimeError("killed")
    with cache.resumable_folder(["training", 1]) as resumed:
        assert (resumed / "state").read_text() == "partial"
        with cache.resumable_folder(["training", 2]) as other:
            assert not list(other.iterdir())
    assert not resumed.exists()


@pytest.mark.parametrize(
    ("source", "is_included"),
    [
        ("checkpoints/quantized_matrix.py", True),
        ("compress/quantization/rtn.py", True),
        ("measure/probes/quality.py", True),
        ("cli/main.py", False),
    ],
)
def test_code_digest_covers_stage_packages_only(source: str, is_included: bool, tmp_path: Path) -> None:
    shutil.copytree(Path(edgeopt.__file__).parent, tmp_path / "edgeopt", ignore=shutil.ignore_patterns("reference"))

    def code_digest() -> str:
        code = "from edgeopt.cache import code_digest; print(code_digest())"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    before = code_digest()
    with (tmp_path / "edgeopt" / source).open("a") as file:
        file.write("# changed\n")
    assert (code_digest() != before) == is_included


def test_stage_cost_is_stored_outside_the_stage(tmp_path: Path) -> None:
    def produce_slowly(folder: Path) -> None:
        time.sleep(0.2)
        (folder / "out").write_text("slow")

    produced = StageCache(tmp_path).get_or_create_stage("k", 1, produce_slowly)
    assert not produced.hit
    assert 0.2 <= produced.cost_s < 2
    assert [path.name for path in produced.folder.iterdir()] == ["out"]
    hit = StageCache(tmp_path).get_or_create_stage("k", 1, produce_slowly)
    assert (hit.hit, hit.folder) == (True, produced.folder)
    assert hit.cost_s == pytest.approx(produced.cost_s)
    cache = StageCache(tmp_path)
    with cache.protect():
        assert [cache.get_or_create_stage("k", 1, produce_slowly) for _ in range(2)] == [hit, hit]


def test_stage_cost_excludes_waiting(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)

    def wait(folder: Path) -> None:
        with cache.waiting():
            time.sleep(0.3)

    assert cache.get_or_create_stage("k", 1, wait).cost_s < 0.2
    assert cache.waited_s >= 0.3


@pytest.mark.parametrize("content", ["", "\0\0\0"], ids=["empty", "corrupted"])
def test_missing_cost_reads_as_zero(tmp_path: Path, content: str) -> None:
    stage = StageCache(tmp_path).get_or_create_stage("k", 1, Writer("old"))
    (tmp_path / "uses" / stage.folder.name).write_text(content)
    assert StageCache(tmp_path).get_or_create_stage("k", 1, Writer("old")).cost_s == 0.0


def test_reproduced_stage_has_its_latest_cost(tmp_path: Path) -> None:
    StageCache(tmp_path).get_or_create("k", 1, lambda _: time.sleep(0.3))
    reproduced = StageCache(tmp_path).get_or_create_stage("k", 1, Writer("new"), lambda _: False)
    assert not reproduced.hit
    assert reproduced.cost_s < 0.2
