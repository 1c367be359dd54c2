from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgeopt.core.result import Failure, Measurement, TrialResult
from edgeopt.search.workers.subprocess_evaluator import SubprocessEvaluator

Progress = Callable[[str], None]


def evaluate(params: Mapping[str, Any], progress: Progress) -> TrialResult:
    """Do what `params` says; called by name in the subprocess."""
    progress("measure\nwith details")
    match params["do"]:
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "raise":
            raise ValueError("unexpected")
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
    pid = Measurement(metric="pid", unit="count", value=os.getpid(), low=0, high=0, count=1, method="getpid")
    return TrialResult(recipe=dict(params), target="t", device={}, emulated=False, measurements=(pid,))


class ExitOnUnpickling:
    """Object that ends the process when it is unpickled there, before the parameters are read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


@pytest.fixture(scope="module")
def evaluator() -> Iterator[SubprocessEvaluator]:
    evaluator = SubprocessEvaluator(evaluate, timeout_s=30)
    yield evaluator
    evaluator.close()


def run(evaluator: SubprocessEvaluator, do: str, lines: list[str] | None = None) -> TrialResult | Failure:
    return evaluator.run({"do": do}, (lines if lines is not None else []).append)


def test_results_and_progress_come_from_the_subprocess(evaluator: SubprocessEvaluator) -> None:
    lines: list[str] = []
    first, second = run(evaluator, "work", lines), run(evaluator, "work", lines)
    assert isinstance(first, TrialResult)
    assert isinstance(second, TrialResult)
    assert first.recipe == {"do": "work"}
    assert first.metrics["pid"] == second.metrics["pid"] != os.getpid()
    assert lines == ["measure\nwith details"] * 2


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("exit", "exit code 7"),
        ("kill", r"killed \(SIGKILL\).*memory"),
        ("segfault", "SIGSEGV"),
        ("raise", "exit code 1"),
    ],
)
def test_evaluator_survives_a_crash(evaluator: SubprocessEvaluator, do: str, message: str) -> None:
    failure = run(evaluator, do)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.stage) == ("Crash", "measure")
    assert re.search(message, failure.message)
    assert isinstance(run(evaluator, "work"), TrialResult)


def test_timeout_ends_the_trial(evaluator: SubprocessEvaluator) -> None:
    assert isinstance(run(evaluator, "work"), TrialResult)  # starts the process before the timeout
    evaluator._timeout_s, before = 1.5, evaluator._timeout_s
    started = time.monotonic()
    failure = run(evaluator, "hang")
    evaluator._timeout_s = before
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.stage) == ("Timeout", "measure")
    assert "1.5 s" in failure.message
    assert time.monotonic() - started < 10
    assert isinstance(run(evaluator, "work"), TrialResult)


def test_idle_process_that_dies_is_restarted(evaluator: SubprocessEvaluator) -> None:
    first = run(evaluator, "work")
    assert isinstance(first, TrialResult)
    os.kill(int(first.metrics["pid"]), signal.SIGKILL)
    second = run(evaluator, "work")
    if isinstance(second, Failure):  # the trial was sent before its death was noticed
        second = run(evaluator, "work")
    assert isinstance(second, TrialResult)
    assert second.metrics["pid"] != first.metrics["pid"]


def test_parent_handles_ctrl_c(evaluator: SubprocessEvaluator) -> None:
    assert isinstance(run(evaluator, "interrupt"), TrialResult)


def test_death_before_reading_the_trial_is_a_crash() -> None:
    evaluator = SubprocessEvaluator(partial(evaluate, ExitOnUnpickling()), timeout_s=30)  # type: ignore[arg-type]
    for _ in range(2):
        failure = run(evaluator, "work")
        assert isinstance(failure, Failure)
        assert failure.kind == "Crash"
        assert "exit code 3" in failure.message
    evaluator.close()


def prepare(path: Path) -> None:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")


def test_process_is_prepared_once_before_its_first_trial(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with closing(SubprocessEvaluator(evaluate, timeout_s=30, prepare=partial(prepare, log))) as evaluator:
        evaluator.start()
        evaluator.start()
        while not log.is_file() or not log.read_text():
            time.sleep(0.01)
        results = [run(evaluator, "work") for _ in range(2)]
        before = log.read_text().split()
        assert [str(int(r.metrics["pid"])) for r in results if isinstance(r, TrialResult)] == before * 2
        assert isinstance(run(evaluator, "exit"), Failure)
        assert isinstance(run(evaluator, "work"), TrialResult)
    assert len(log.read_text().split()) == 2


def test_close_ends_the_process_and_is_idempotent() -> None:
    evaluator = SubprocessEvaluator(evaluate, timeout_s=30)
    evaluator.close()
    result = run(evaluator, "work")
    assert isinstance(result, TrialResult)
    evaluator.close()
    evaluator.close()
    assert not Path(f"/proc/{int(result.metrics['pid'])}").exists()


def test_process_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from search.workers.test_subprocess_evaluator import evaluate\n"
        "from edgeopt.search.workers.subprocess_evaluator import SubprocessEvaluator\n"
        "if __name__ == '__main__':\n"
        "    result = SubprocessEvaluator(evaluate, timeout_s=30).run({'do': 'work'}, str)\n"
        "    print(int(result.metrics['pid']), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    tests = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, script, tests], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.05)
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"
