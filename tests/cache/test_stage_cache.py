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


def write(text: str) -> Writer:
    return Writer(text)


class Writer:
    """Produces one file and counts how often it was asked."""

    def __init__(self, text: str) -> None:
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> None:
        assert not list(folder.iterdir()), "a producer gets an empty folder"
        self.calls += 1
        (folder / "out").write_text(self.text)


def stages(store: StageCache, kind: str = "k") -> list[Path]:
    folder = store.root / kind
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_equal_inputs_are_produced_once(tmp_path: Path) -> None:
    writer = write("a")
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
def test_other_inputs_and_kinds_are_other_stages(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[tuple[str, list[int]]]
) -> None:
    store = StageCache(tmp_path_factory.mktemp("store"))
    folders = {store.get_or_create(kind, data, write(repr(data))) for kind, data in inputs}
    assert len(folders) == len(inputs)


def test_a_failure_is_not_kept_and_the_next_try_works(tmp_path: Path) -> None:
    store = StageCache(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise StepError("out of luck")

    with pytest.raises(StepError, match="out of luck"):
        store.get_or_create("k", 1, fails)
    assert not stages(store)
    assert not list((store.root / "scratch").iterdir()), "what a failed producer left is cleared away"
    assert (store.get_or_create("k", 1, write("whole")) / "out").read_text() == "whole"


def test_an_interrupted_producer_leaves_nothing(tmp_path: Path) -> None:
    store = StageCache(tmp_path)

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_create("k", 1, interrupted)
    assert not stages(store)


def killed(folder: Path) -> None:
    (folder / "out").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_producer_leaves_no_stage_and_no_lock(tmp_path: Path) -> None:
    store = StageCache(tmp_path)
    process = FORK.Process(target=store.get_or_create, args=("k", 1, killed))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not stages(store)
    folder = StageCache(tmp_path).get_or_create("k", 1, write("whole"))
    assert [p.name for p in folder.iterdir()] == ["out"]
    assert (folder / "out").read_text() == "whole"
    assert list((tmp_path / "scratch").iterdir()) == []


def slow(folder: Path) -> None:
    with (folder.parent.parent / "calls").open("a") as calls:
        calls.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    (folder / "out").write_text("slow")


def test_two_processes_that_race_produce_once(tmp_path: Path) -> None:
    store = StageCache(tmp_path)
    racers = [FORK.Process(target=store.get_or_create, args=("k", "same", slow)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert len(stages(store)) == 1


def test_other_stages_do_not_wait_for_one_another(tmp_path: Path) -> None:
    store = StageCache(tmp_path)

    def nested(folder: Path) -> None:
        inner = store.get_or_create("k", "inner", write("inner"))
        (folder / "out").write_text((inner / "out").read_text())

    assert (store.get_or_create("k", "outer", nested) / "out").read_text() == "inner"


def test_an_invalid_stage_is_made_anew_and_a_valid_one_is_kept(tmp_path: Path) -> None:
    store, again = StageCache(tmp_path), write("good")
    store.get_or_create("k", 1, write("bad"))

    def valid(folder: Path) -> bool:
        return (folder / "out").read_text() == "good"

    assert (store.get_or_create("k", 1, again, valid) / "out").read_text() == "good"
    store.get_or_create("k", 1, again, valid)
    assert again.calls == 1


def test_a_stage_that_stays_invalid_is_returned_as_it_came_out(tmp_path: Path) -> None:
    store, noisy = StageCache(tmp_path), write("noisy")
    for calls in (1, 2):
        assert (store.get_or_create("k", 1, noisy, lambda _: False) / "out").read_text() == "noisy"
        assert noisy.calls == calls


@pytest.mark.parametrize("below", ["file", "file/state"])
def test_a_root_that_is_no_folder_is_a_store_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written") as caught:
        StageCache(tmp_path / below)
    assert caught.value.location == str(tmp_path / below)
    assert "state" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into folders that are read-only")
def test_a_root_without_write_permission_is_a_store_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        StageCache(tmp_path / "state")


def test_a_root_on_a_read_only_file_system_is_a_store_error() -> None:
    if not Path("/sys/kernel").is_dir():
        pytest.skip("no file system here is read-only for everybody")
    with pytest.raises(StoreError, match="cannot be written"):
        StageCache(Path("/sys/kernel/edgeopt"))


def test_a_root_that_went_away_is_a_store_error(tmp_path: Path) -> None:
    store = StageCache(tmp_path / "state")
    (tmp_path / "state" / "scratch").rmdir()
    (tmp_path / "state").rmdir()
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        store.get_or_create("k", 1, write("a"))


def test_a_draft_is_there_again_after_a_failure_and_gone_when_the_work_is_done(tmp_path):
    store = StageCache(tmp_path)
    with contextlib.suppress(RuntimeError), store.resumable_folder(["training", 1]) as folder:
        (folder / "state").write_text("half")
        raise RuntimeError("killed")
    with store.resumable_folder(["training", 1]) as again:
        assert (again / "state").read_text() == "half"
        with store.resumable_folder(["training", 2]) as other:
            assert not list(other.iterdir())
    assert not again.exists()


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ("checkpoints/quantized_matrix.py", True),
        ("compress/quantization/rtn.py", True),
        ("measure/probes/quality.py", True),
        ("cli/main.py", False),
    ],
)
def test_new_code_that_decides_what_a_stage_produces_makes_it_anew(source: str, counts: bool, tmp_path: Path) -> None:
    shutil.copytree(Path(edgeopt.__file__).parent, tmp_path / "edgeopt", ignore=shutil.ignore_patterns("reference"))

    def code_digest() -> str:
        code = "from edgeopt.cache import code_digest; print(code_digest())"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    before = code_digest()
    with (tmp_path / "edgeopt" / source).open("a") as file:
        file.write("# changed\n")
    assert (code_digest() != before) == counts


def test_a_stage_remembers_beside_itself_what_it_cost_whoever_asks(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        time.sleep(0.2)
        (folder / "out").write_text("slow")

    made = StageCache(tmp_path).get_or_create_stage("k", 1, slow)
    assert not made.found
    assert 0.2 <= made.cost_s < 2
    assert [path.name for path in made.folder.iterdir()] == ["out"], "what it cost is no part of the stage"
    found = StageCache(tmp_path).get_or_create_stage("k", 1, slow)
    assert (found.found, found.folder) == (True, made.folder)
    assert found.cost_s == pytest.approx(made.cost_s)
    store = StageCache(tmp_path)
    with store.protect():
        assert [store.get_or_create_stage("k", 1, slow) for _ in range(2)] == [found, found]


def test_waiting_is_no_part_of_what_a_stage_costs(tmp_path: Path) -> None:
    store = StageCache(tmp_path)

    def waits(folder: Path) -> None:
        with store.waiting():
            time.sleep(0.3)

    assert store.get_or_create_stage("k", 1, waits).cost_s < 0.2
    assert store.waited_s >= 0.3


@pytest.mark.parametrize("mark", ["", "\0\0\0"], ids=["none", "spoiled"])
def test_a_stage_of_a_cache_that_remembers_no_cost_costs_nothing(tmp_path: Path, mark: str) -> None:
    made = StageCache(tmp_path).get_or_create_stage("k", 1, write("old"))
    (tmp_path / "uses" / made.folder.name).write_text(mark)
    assert StageCache(tmp_path).get_or_create_stage("k", 1, write("old")).cost_s == 0.0


def test_an_invalid_stage_that_is_made_anew_costs_what_it_cost_last(tmp_path: Path) -> None:
    StageCache(tmp_path).get_or_create("k", 1, lambda _: time.sleep(0.3))
    anew = StageCache(tmp_path).get_or_create_stage("k", 1, write("new"), lambda _: False)
    assert not anew.found
    assert anew.cost_s < 0.2
