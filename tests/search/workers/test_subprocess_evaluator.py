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
    """Does what `params` says; called by name in another process."""
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
            raise ValueError("unforeseen")
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
    pid = Measurement(metric="pid", unit="count", value=os.getpid(), low=0, high=0, count=1, method="getpid")
    return TrialResult(recipe=dict(params), target="t", device={}, emulated=False, measurements=(pid,))


class DiesOnArrival:
    """Ends the process as soon as it is unpickled there, before the parameters are read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


@pytest.fixture(scope="module")
def worker() -> Iterator[SubprocessEvaluator]:
    made = SubprocessEvaluator(evaluate, timeout_s=30)
    yield made
    made.close()


def answer(worker: SubprocessEvaluator, do: str, lines: list[str] | None = None) -> TrialResult | Failure:
    return worker.run({"do": do}, (lines if lines is not None else []).append)


def test_results_and_progress_come_from_one_other_process(worker: SubprocessEvaluator) -> None:
    lines: list[str] = []
    first, second = answer(worker, "work", lines), answer(worker, "work", lines)
    assert isinstance(first, TrialResult)
    assert isinstance(second, TrialResult)
    assert first.recipe == {"do": "work"}
    assert first.metrics["pid"] == second.metrics["pid"] != os.getpid()
    assert lines == ["measure\nwith details"] * 2


@pytest.mark.parametrize(
    ("do", "told"),
    [
        ("exit", "exit code 7"),
        ("kill", r"killed \(SIGKILL\).*memory"),
        ("segfault", "SIGSEGV"),
        ("raise", "exit code 1"),
    ],
)
def test_a_crash_ends_the_trial_and_the_next_one_works(worker: SubprocessEvaluator, do: str, told: str) -> None:
    failure = answer(worker, do)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.stage) == ("Crash", "measure")
    assert re.search(told, failure.message)
    assert isinstance(answer(worker, "work"), TrialResult)


def test_a_trial_that_takes_too_long_is_ended(worker: SubprocessEvaluator) -> None:
    assert isinstance(answer(worker, "work"), TrialResult)  # started, so that the time-out is of the trial alone
    worker._timeout_s, before = 1.5, worker._timeout_s
    started = time.monotonic()
    failure = answer(worker, "hang")
    worker._timeout_s = before
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.stage) == ("Timeout", "measure")
    assert "1.5 s" in failure.message
    assert time.monotonic() - started < 10
    assert isinstance(answer(worker, "work"), TrialResult)


def test_a_process_that_dies_between_trials_is_started_again(worker: SubprocessEvaluator) -> None:
    first = answer(worker, "work")
    assert isinstance(first, TrialResult)
    os.kill(int(first.metrics["pid"]), signal.SIGKILL)
    second = answer(worker, "work")
    if isinstance(second, Failure):  # its death was not yet seen when the trial was sent
        second = answer(worker, "work")
    assert isinstance(second, TrialResult)
    assert second.metrics["pid"] != first.metrics["pid"]


def test_ctrl_c_is_left_to_the_parent(worker: SubprocessEvaluator) -> None:
    assert isinstance(answer(worker, "interrupt"), TrialResult)


def test_a_process_that_dies_before_it_reads_its_trial_is_a_crash() -> None:
    worker = SubprocessEvaluator(partial(evaluate, DiesOnArrival()), timeout_s=30)  # type: ignore[arg-type]
    for _ in range(2):
        failure = answer(worker, "work")
        assert isinstance(failure, Failure)
        assert failure.kind == "Crash"
        assert "exit code 3" in failure.message
    worker.close()


def prepare(path: Path) -> None:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")


def test_it_starts_and_prepares_before_the_first_trial_and_once_a_process(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with closing(SubprocessEvaluator(evaluate, timeout_s=30, prepare=partial(prepare, told))) as worker:
        worker.start()
        worker.start()
        while not told.is_file() or not told.read_text():
            time.sleep(0.01)
        results = [answer(worker, "work") for _ in range(2)]
        before = told.read_text().split()
        assert [str(int(r.metrics["pid"])) for r in results if isinstance(r, TrialResult)] == before * 2
        assert isinstance(answer(worker, "exit"), Failure)
        assert isinstance(answer(worker, "work"), TrialResult)
    assert len(told.read_text().split()) == 2


def test_closing_ends_the_process_and_may_be_repeated() -> None:
    worker = SubprocessEvaluator(evaluate, timeout_s=30)
    worker.close()
    result = answer(worker, "work")
    assert isinstance(result, TrialResult)
    worker.close()
    worker.close()
    assert not Path(f"/proc/{int(result.metrics['pid'])}").exists()


def test_the_process_dies_with_a_killed_parent(tmp_path: Path) -> None:
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
