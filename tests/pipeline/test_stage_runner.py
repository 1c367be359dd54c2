"""Check how the stage runner records time, waiting, savings and artifacts."""

from __future__ import annotations

import time
from pathlib import Path

from edgeopt.cache import StageCache
from edgeopt.pipeline.stage_runner import WAIT, StageRunner


def produce(directory: Path) -> None:
    time.sleep(0.05)
    (directory / "out").write_text("out")


def create_runner(folder: Path) -> StageRunner:
    return StageRunner(StageCache(folder / "cache"), lambda line: None)


def test_cache_hit_counts_once_as_saved(tmp_path: Path) -> None:
    first = create_runner(tmp_path)
    with first.timed("build"):
        first.get_or_create("files", 1, produce)
    assert first.saved_s == {}
    second = create_runner(tmp_path)
    cost_s = second.cache.get_or_create_stage("files", 1, produce).cost_s
    with second.timed("build"):
        folders = [second.get_or_create("files", 1, produce) for _ in range(2)]
    assert folders[0] == folders[1]
    assert second.saved_s == {"build": cost_s}


def test_nested_cache_hit_names_its_kind(tmp_path: Path) -> None:
    create_runner(tmp_path).get_or_create("files", 1, produce)
    runner = create_runner(tmp_path)
    with runner.timed("build"):
        runner.get_or_create("engine", 1, lambda _: runner.get_or_create("files", 1, produce) and None)
    assert runner.saved_s.keys() == {"build/files"}


def test_waiting_is_not_part_of_stage_time(tmp_path: Path) -> None:
    runner = create_runner(tmp_path)
    with runner.timed("measure"), runner.cache.waiting():
        time.sleep(0.1)
    assert runner.current_stage == "measure"
    assert runner.timings_s["measure"] < 0.1 <= runner.timings_s[WAIT]


def test_missing_artifact_is_ignored(tmp_path: Path) -> None:
    runner = create_runner(tmp_path)
    runner.keep_artifact("logs", tmp_path / "logs")
    runner.keep_artifact("folder", tmp_path)
    assert runner.artifacts == {"folder": str(tmp_path)}
