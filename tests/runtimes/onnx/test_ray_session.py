"""Test that a pipeline of processes matches one process, and that it recovers from a killed process."""

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

SHARDS, NEW_TOKENS = 4, 12


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(shards=SHARDS), checkpoint, tmp_path_factory.mktemp("sharded") / "engine")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start a Ray cluster on this machine, which the sessions join."""
    ray.init(log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def run_prompt(engine: Engine, runtime: PortableOnnx) -> tuple[np.ndarray, list[int]]:
    """Return the logits of the prompt and the generated tokens."""
    session = runtime.open(engine, threads=1)
    results = session.logits(PROMPT), list(session.generate(PROMPT[:40], NEW_TOKENS, stop_at_end=False))
    session.close()
    return results


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("processes", [2, 3])
def test_pipeline_matches_single_process(engine: Engine, processes: int) -> None:
    logits, tokens = run_prompt(engine, PortableOnnx(shards=SHARDS, processes=processes, spinning=False))
    expected, expected_tokens = run_prompt(engine, PortableOnnx())
    assert relative_error(expected, logits) < 1e-5
    assert tokens == expected_tokens


@pytest.mark.usefixtures("cluster")
def test_pipeline_with_budgets_matches_single_process(engine: Engine) -> None:
    single = PortableOnnx(shards=SHARDS, kv_resident="0 B", kv_window=32, resident="0 B", prepacked=False)
    pipeline = PortableOnnx(
        shards=SHARDS, kv_resident="0 B", kv_window=32, resident="0 B", prepacked=False, processes=2, spinning=False
    )
    (logits, tokens), (expected, expected_tokens) = run_prompt(engine, pipeline), run_prompt(engine, single)
    assert relative_error(expected, logits) < 1e-5
    assert tokens == expected_tokens


@pytest.mark.usefixtures("cluster")
def test_session_recovers_from_killed_process(engine: Engine) -> None:
    _, expected = run_prompt(engine, PortableOnnx())
    session = PortableOnnx(shards=SHARDS, processes=2, spinning=False).open(engine, threads=1)
    assert isinstance(session, DistributedSession)
    assert [re.sub(r"\d+ on [^,]+", "N", process) for process in session.processes] == [
        "process N, shards 0 to 1",
        "process N, shards 2 to 3",
    ]
    (second,) = re.findall(r"process (\d+) ", session.processes[1])
    generated = session.generate(PROMPT[:40], NEW_TOKENS, stop_at_end=False)
    assert next(generated) == expected[0]
    os.kill(int(second), signal.SIGKILL)
    with pytest.raises(MeasureError, match=rf"has ended \(process {second} on .*shards 2 to 3\).*started again"):
        list(generated)
    assert list(session.generate(PROMPT[:40], NEW_TOKENS, stop_at_end=False)) == expected
    session.close()
    session.close()


def test_more_processes_than_shards_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"processes: .* between 1 and the number of shards \(2\), got 3"):
        PortableOnnx(shards=2, processes=3)


@pytest.mark.usefixtures("cluster")
def test_engine_with_too_few_shards_is_rejected(engine: Engine) -> None:
    with pytest.raises(BuildError, match="`processes` must be at most the engine's 4 shards, got 5"):
        PortableOnnx(shards=5, processes=5).open(engine, threads=1)
