from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from edgeopt.errors import MeasureError
from edgeopt.machine import device_lease

HOLDER = """
import sys, pathlib
from edgeopt.machine import device_lease
with device_lease.exclusive(lambda line: None, pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


WORKER = HOLDER.replace("device_lease.exclusive", "device_lease.shared")


def start(code: str, folder: Path) -> subprocess.Popen[bytes]:
    root = Path(device_lease.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()


@pytest.fixture
def holder(tmp_path):
    process = start(HOLDER, tmp_path)
    yield process
    ended(process)


@pytest.fixture
def worker(tmp_path):
    process = start(WORKER, tmp_path)
    yield process
    ended(process)


def wait_for(
    folder: Path,
    take: Callable[..., AbstractContextManager[None]] = device_lease.exclusive,
    done: Callable[[], None] = lambda: None,
) -> tuple[threading.Thread, threading.Event, list[str]]:
    """A thread that takes the lease, the event that it did, and what it said while it waited."""
    said: list[str] = []
    waiting, held = threading.Event(), threading.Event()

    def run() -> None:
        with take(lambda line: (said.append(line), waiting.set()), folder):
            done()
            held.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert waiting.wait(10)
    return thread, held, said


def test_a_second_measurement_waits_and_says_for_whom(holder, tmp_path):
    thread, held, said = wait_for(tmp_path)
    assert not held.is_set()
    assert str(holder.pid) in said[0]
    holder.stdin.close()
    thread.join(10)
    assert held.is_set()


def test_a_holder_that_is_killed_leaves_the_device_free(holder, tmp_path):
    thread, held, _ = wait_for(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    thread.join(10)
    assert held.is_set()


def test_a_failed_measurement_leaves_the_device_free(tmp_path):
    with pytest.raises(ZeroDivisionError), device_lease.exclusive(lambda line: None, tmp_path):
        1 / 0  # noqa: B018
    said: list[str] = []
    with device_lease.exclusive(said.append, tmp_path):
        assert said == []


def test_a_lock_that_points_elsewhere_is_refused(tmp_path):
    folder = tmp_path / f"edgeopt-{os.getuid()}"
    folder.mkdir()
    (folder / "device.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(MeasureError, match="lease"), device_lease.exclusive(lambda line: None, tmp_path):
        pass
    assert not (tmp_path / "precious").exists()


def test_any_number_works_at_once(worker, tmp_path):
    other = start(WORKER, tmp_path)
    said: list[str] = []
    with device_lease.shared(said.append, tmp_path):
        assert said == []
    ended(other)


@pytest.mark.parametrize("ends", [signal.SIGKILL, None], ids=["killed", "done"])
def test_a_measurement_waits_for_work_and_says_so(worker, tmp_path, ends):
    thread, held, said = wait_for(tmp_path)
    assert not held.is_set()
    assert "compress or build" in said[0]
    if ends is None:
        worker.stdin.close()
    else:
        os.kill(worker.pid, ends)
    thread.join(10)
    assert held.is_set()


def test_work_waits_while_a_measurement_runs_and_says_for_whom(holder, tmp_path):
    thread, held, said = wait_for(tmp_path, device_lease.shared)
    assert not held.is_set()
    assert f"process {holder.pid} measures" in said[0]
    holder.stdin.close()
    thread.join(10)
    assert held.is_set()


def test_new_work_waits_behind_a_measurement_that_waits_for_old_work(worker, tmp_path):
    measuring, measured, _ = wait_for(tmp_path)
    working, worked, _ = wait_for(tmp_path, device_lease.shared)
    assert not measured.is_set()
    assert not worked.is_set()
    worker.stdin.close()
    for thread in (measuring, working):
        thread.join(10)
    assert measured.is_set()
    assert worked.is_set()


def test_no_process_waits_for_itself(tmp_path):
    said: list[str] = []
    with device_lease.shared(said.append, tmp_path), device_lease.shared(said.append, tmp_path):
        with (
            device_lease.exclusive(said.append, tmp_path),
            device_lease.exclusive(said.append, tmp_path),
            device_lease.shared(said.append, tmp_path),
        ):
            pass
        thread, held, _ = wait_for(tmp_path)
        assert not held.is_set(), "the work goes on after the measurement inside it"
    thread.join(10)
    assert held.is_set()
    assert said == []


def test_work_inside_work_starts_though_a_measurement_waits(tmp_path):
    with device_lease.shared(lambda line: None, tmp_path):
        thread, held, _ = wait_for(tmp_path)
        with device_lease.shared(lambda line: None, tmp_path):
            assert not held.is_set()
    thread.join(10)
    assert held.is_set()


def test_a_measurement_inside_work_lets_another_that_waits_go_first(tmp_path):
    order: list[str] = []
    with device_lease.shared(lambda line: None, tmp_path):
        thread, _, _ = wait_for(tmp_path, done=lambda: order.append("other"))
        with device_lease.exclusive(lambda line: None, tmp_path):
            order.append("own")
    thread.join(10)
    assert order == ["other", "own"]
