"""Shards in processes one behind another compute as the whole, and one that ends takes nothing but its answer."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from support.stages import build_engine

from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.protocols import DistributedSession
from edgeopt.errors import BuildError, ConfigError, MeasureError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.test_families import PROMPT

ray = pytest.importorskip("ray", reason="pip install 'edgeopt[ray]'")

SHARDS, NEW = 4, 12


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(shards=SHARDS), checkpoint, tmp_path_factory.mktemp("cut") / "engine")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One of this machine, which sessions join."""
    ray.init(log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def generated(engine: Engine, runtime: PortableOnnx) -> tuple[np.ndarray, list[int]]:
    session = runtime.open(engine, threads=1)
    found = session.logits(PROMPT), list(session.generate(PROMPT[:40], NEW, stop_at_end=False))
    session.close()
    return found


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_compute_and_generate_what_one_does(engine: Engine, processes: int) -> None:
    logits, tokens = generated(engine, PortableOnnx(shards=SHARDS, processes=processes, spinning=False))
    expected, told = generated(engine, PortableOnnx())
    assert relative_error(expected, logits) < 1e-5
    assert tokens == told


@pytest.mark.usefixtures("cluster")
def test_budgets_and_windows_hold_in_each_process(engine: Engine) -> None:
    alone = PortableOnnx(shards=SHARDS, kv_resident="0 B", kv_window=32, resident="0 B", prepacked=False)
    shared = PortableOnnx(
        shards=SHARDS, kv_resident="0 B", kv_window=32, resident="0 B", prepacked=False, processes=2, spinning=False
    )
    (logits, tokens), (expected, told) = generated(engine, shared), generated(engine, alone)
    assert relative_error(expected, logits) < 1e-5
    assert tokens == told


@pytest.mark.usefixtures("cluster")
def test_a_process_that_is_killed_in_the_middle_is_told_and_the_next_answer_is_whole(engine: Engine) -> None:
    _, expected = generated(engine, PortableOnnx())
    session = PortableOnnx(shards=SHARDS, processes=2, spinning=False).open(engine, threads=1)
    assert isinstance(session, DistributedSession)
    assert [re.sub(r"\d+ on [^,]+", "N", process) for process in session.processes] == [
        "process N, shards 0 to 1",
        "process N, shards 2 to 3",
    ]
    (second,) = re.findall(r"process (\d+) ", session.processes[1])
    answer = session.generate(PROMPT[:40], NEW, stop_at_end=False)
    assert next(answer) == expected[0]
    os.kill(int(second), signal.SIGKILL)
    with pytest.raises(MeasureError, match=rf"one has ended \(process {second} on .*shards 2 to 3\).*started anew"):
        list(answer)
    assert list(session.generate(PROMPT[:40], NEW, stop_at_end=False)) == expected
    session.close()
    session.close()


def test_more_processes_than_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="processes: 3 processes cannot share shards of which there are 2"):
        PortableOnnx(shards=2, processes=3)


@pytest.mark.usefixtures("cluster")
def test_an_engine_of_fewer_shards_than_processes_is_refused(engine: Engine) -> None:
    with pytest.raises(BuildError, match="cut into 4 shards, which are fewer than 5 processes"):
        PortableOnnx(shards=5, processes=5).open(engine, threads=1)
