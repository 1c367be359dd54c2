"""Each thread of a session computes on a processor of its own, and nothing else is held there."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import toy_bench
from support.stages import build_engine

from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.protocols import Session
from edgeopt.errors import BuildError, ConfigError
from edgeopt.measure.harness.bench import measure
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.onnxruntime_common import thread_affinity
from runtimes.test_families import CALIBRATION

SHARDS = 3
RUNTIMES = {"genai": Genai(), "onnx": PortableOnnx(shards=SHARDS)}
PROMPT, NEW, PATIENCE_S = [2 + 7 * i % 290 for i in range(40)], 100, 60
FIRST, SECOND = (*sorted(os.sched_getaffinity(0)), -1)[:2]
two_processors = pytest.mark.skipif(SECOND < 0, reason="this process may use one processor alone")


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def made(request, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Genai, Engine]:
    """A runtime and an engine of it."""
    return request.param, build_engine(request.param, checkpoint, tmp_path_factory.mktemp("engines") / "engine")


def where(thread: int) -> str:
    """The processors that a thread may use."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def generated(session: Session) -> list[int]:
    return list(session.generate(PROMPT, NEW, stop_at_end=False))


def kept(started: set[int], count: int) -> bool:
    """Whether so many of these threads are kept on the first processor alone, which each sees to once it runs."""
    deadline = time.monotonic() + PATIENCE_S
    while [where(thread) for thread in started].count(str(FIRST)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return [where(thread) for thread in started].count(str(FIRST)) == count


def seen(session: Session, wanted: str) -> set[str]:
    """Where another thread saw the calling one kept while this generated, again and again until that was `wanted`."""
    caller, found, deadline = threading.get_native_id(), set[str](), time.monotonic() + PATIENCE_S
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            found.add(where(caller))

    looking = threading.Thread(target=look)
    looking.start()
    while wanted not in found and time.monotonic() < deadline:
        generated(session)
    done.set()
    looking.join()
    return found


@pytest.fixture
def opened(made: tuple[Genai, Engine]) -> Iterator[tuple[Session, set[int]]]:
    """A session whose calling thread has the second processor, and the threads that it started."""
    runtime, engine = made
    before = threads()
    session = replace(runtime, affinity=f"{SECOND},{FIRST}").open(engine, threads=2)
    yield session, threads() - before
    session.close()


@two_processors
def test_each_thread_computes_on_its_own_processor_alone(opened: tuple[Session, set[int]]) -> None:
    session, started = opened
    assert kept(started, 1)
    before = where(threading.get_native_id())
    assert {str(SECOND)} <= seen(session, str(SECOND)) <= {str(SECOND), before}
    assert where(threading.get_native_id()) == before


@two_processors
def test_what_is_generated_is_the_same(opened: tuple[Session, set[int]], made: tuple[Genai, Engine]) -> None:
    runtime, engine = made
    free = runtime.open(engine, threads=2)
    assert generated(opened[0]) == generated(free)
    free.close()


@two_processors
def test_guesses_are_read_there_too(made: tuple[Genai, Engine]) -> None:
    runtime, engine = made
    session = replace(runtime, affinity=SECOND, prompt_lookup=2).open(engine, threads=1)
    assert str(SECOND) in seen(session, str(SECOND))
    session.close()


@two_processors
@pytest.mark.parametrize("made", [RUNTIMES["onnx"]], indirect=True, ids=["onnx"])
def test_threads_of_every_shard_are_kept(made: tuple[PortableOnnx, Engine]) -> None:
    (runtime, engine), before = made, threads()
    session = replace(runtime, kv_resident="0 B", affinity=f"{SECOND},{FIRST}").open(engine, threads=2)
    assert kept(threads() - before, SHARDS)
    assert str(SECOND) in seen(session, str(SECOND))
    session.close()


@two_processors
def test_measured_processes_are_kept_on_the_chosen_processors(made: tuple[Genai, Engine], tmp_path: Path) -> None:
    runtime, engine = made
    chosen, target = replace(runtime, affinity=SECOND), replace(toy_bench.TARGET, threads=1)
    measure(engine, chosen, toy_bench.make_bench("size", "memory"), target, CALIBRATION, tmp_path, {}, lambda _: None)
    assert json.loads((tmp_path / "samples.json").read_text())["cores"] == [SECOND]


def test_more_threads_than_processors_are_refused(made: tuple[Genai, Engine]) -> None:
    runtime, engine = made
    with pytest.raises(BuildError, match=rf"runtime\.affinity: .* each of 2 threads, got {FIRST}.*target\.threads"):
        replace(runtime, affinity=FIRST).open(engine, threads=2)


def test_a_processor_that_is_not_here_is_refused_with_those_that_are(made: tuple[Genai, Engine]) -> None:
    runtime, engine = made
    told = rf"runtime\.affinity: this process is not allowed to use processor 9998, 9999\. Use some of {FIRST}"
    with pytest.raises(BuildError, match=told):
        replace(runtime, affinity="9998-9999").open(engine, threads=2)
    session = replace(runtime, affinity=f"{FIRST},9999").open(engine, threads=1)  # there is no second thread
    session.close()


def test_processors_are_listed_as_for_taskset() -> None:
    found = [thread_affinity.parse(listed) for listed in (3, "3", "0,2", "2, 0", "4-7", "0-1,8,6-6")]
    assert found == [(3,), (3,), (0, 2), (2, 0), (4, 5, 6, 7), (0, 1, 8, 6)]


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
@pytest.mark.parametrize("listed", ["", "0,", "a", "-1", -1, "3-1", "0,0", "0-2,1", "0-99999", "0;1"])
def test_what_lists_no_processors_is_refused(runtime: Genai, listed: str | int) -> None:
    with pytest.raises(ConfigError, match=r"affinity: .*Use numbers and ranges as in taskset, such as 0,2 or 4-7"):
        replace(runtime, affinity=listed)


def test_processes_that_may_lie_on_other_hosts_have_no_processors_of_their_own() -> None:
    with pytest.raises(ConfigError, match="affinity: processes may lie on hosts whose processors are others"):
        PortableOnnx(shards=2, processes=2, affinity="0,1")
