"""Test that each thread of a session is pinned to its processor, and only while it computes."""

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
PROMPT, NEW_TOKENS, TIMEOUT_S = [2 + 7 * i % 290 for i in range(40)], 100, 60
FIRST, SECOND = (*sorted(os.sched_getaffinity(0)), -1)[:2]
needs_two_processors = pytest.mark.skipif(SECOND < 0, reason="this process is allowed to use only one processor")


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def built(request, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Genai, Engine]:
    """Return a runtime and an engine of it."""
    return request.param, build_engine(request.param, checkpoint, tmp_path_factory.mktemp("engines") / "engine")


def allowed_cpus(thread: int) -> str:
    """Return the processors that a thread is allowed to use."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))


def thread_ids() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def generate(session: Session) -> list[int]:
    return list(session.generate(PROMPT, NEW_TOKENS, stop_at_end=False))


def count_pinned(started: set[int], expected: int) -> int:
    """Return how many threads are pinned to the first processor. Wait for `expected`, as a thread pins itself late."""
    deadline = time.monotonic() + TIMEOUT_S
    while [allowed_cpus(thread) for thread in started].count(str(FIRST)) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return [allowed_cpus(thread) for thread in started].count(str(FIRST))


def observe_affinity(session: Session, expected: str) -> set[str]:
    """Return the affinities of the calling thread during generation, repeated until `expected` is observed."""
    caller, observed, deadline = threading.get_native_id(), set[str](), time.monotonic() + TIMEOUT_S
    done = threading.Event()

    def observe() -> None:
        while not done.is_set():
            observed.add(allowed_cpus(caller))

    observer = threading.Thread(target=observe)
    observer.start()
    while expected not in observed and time.monotonic() < deadline:
        generate(session)
    done.set()
    observer.join()
    return observed


@pytest.fixture
def opened(built: tuple[Genai, Engine]) -> Iterator[tuple[Session, set[int]]]:
    """Return a session whose calling thread is pinned to the second processor, and the threads that it started."""
    runtime, engine = built
    before = thread_ids()
    session = replace(runtime, affinity=f"{SECOND},{FIRST}").open(engine, threads=2)
    yield session, thread_ids() - before
    session.close()


@needs_two_processors
def test_thread_is_pinned_while_it_computes(opened: tuple[Session, set[int]]) -> None:
    session, started = opened
    assert count_pinned(started, 1) == 1
    before = allowed_cpus(threading.get_native_id())
    assert {str(SECOND)} <= observe_affinity(session, str(SECOND)) <= {str(SECOND), before}
    assert allowed_cpus(threading.get_native_id()) == before


@needs_two_processors
def test_pinned_session_generates_same_tokens(opened: tuple[Session, set[int]], built: tuple[Genai, Engine]) -> None:
    runtime, engine = built
    unpinned = runtime.open(engine, threads=2)
    assert generate(opened[0]) == generate(unpinned)
    unpinned.close()


@needs_two_processors
def test_prompt_lookup_computes_pinned(built: tuple[Genai, Engine]) -> None:
    runtime, engine = built
    session = replace(runtime, affinity=SECOND, prompt_lookup=2).open(engine, threads=1)
    assert str(SECOND) in observe_affinity(session, str(SECOND))
    session.close()


@needs_two_processors
@pytest.mark.parametrize("built", [RUNTIMES["onnx"]], indirect=True, ids=["onnx"])
def test_threads_of_every_shard_are_pinned(built: tuple[PortableOnnx, Engine]) -> None:
    (runtime, engine), before = built, thread_ids()
    session = replace(runtime, kv_resident="0 B", affinity=f"{SECOND},{FIRST}").open(engine, threads=2)
    assert count_pinned(thread_ids() - before, SHARDS) == SHARDS
    assert str(SECOND) in observe_affinity(session, str(SECOND))
    session.close()


@needs_two_processors
def test_measured_process_uses_only_chosen_processors(built: tuple[Genai, Engine], tmp_path: Path) -> None:
    runtime, engine = built
    pinned, target = replace(runtime, affinity=SECOND), replace(toy_bench.TARGET, threads=1)
    measure(engine, pinned, toy_bench.make_bench("size", "memory"), target, CALIBRATION, tmp_path, {}, lambda _: None)
    assert json.loads((tmp_path / "samples.json").read_text())["cores"] == [SECOND]


def test_too_few_processors_are_rejected(built: tuple[Genai, Engine]) -> None:
    runtime, engine = built
    with pytest.raises(BuildError, match=rf"runtime\.affinity: .* each of 2 threads, got {FIRST}.*target\.threads"):
        replace(runtime, affinity=FIRST).open(engine, threads=2)


def test_error_lists_allowed_processors(built: tuple[Genai, Engine]) -> None:
    runtime, engine = built
    message = rf"runtime\.affinity: this process is not allowed to use processor 9998, 9999\. Use some of {FIRST}"
    with pytest.raises(BuildError, match=message):
        replace(runtime, affinity="9998-9999").open(engine, threads=2)
    session = replace(runtime, affinity=f"{FIRST},9999").open(engine, threads=1)  # a second thread does not exist
    session.close()


def test_parse_accepts_taskset_syntax() -> None:
    parsed = [thread_affinity.parse(affinity) for affinity in (3, "3", "0,2", "2, 0", "4-7", "0-1,8,6-6")]
    assert parsed == [(3,), (3,), (0, 2), (2, 0), (4, 5, 6, 7), (0, 1, 8, 6)]


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
@pytest.mark.parametrize("affinity", ["", "0,", "a", "-1", -1, "3-1", "0,0", "0-2,1", "0-99999", "0;1"])
def test_invalid_processor_list_is_rejected(runtime: Genai, affinity: str | int) -> None:
    with pytest.raises(ConfigError, match=r"affinity: .*Use numbers and ranges as in taskset, such as 0,2 or 4-7"):
        replace(runtime, affinity=affinity)


def test_ray_processes_reject_affinity() -> None:
    with pytest.raises(ConfigError, match="`affinity` requires a single process"):
        PortableOnnx(shards=2, processes=2, affinity="0,1")
