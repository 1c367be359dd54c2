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

EXCLUSIVE_HOLDER = """
import sys, pathlib
from edgeopt.machine import device_lease
with device_lease.exclusive(lambda line: None, pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
SHARED_HOLDER = EXCLUSIVE_HOLDER.replace("device_lease.exclusive", "device_lease.shared")


def start_holder(code: str, folder: Path) -> subprocess.Popen[bytes]:
    root = Path(device_lease.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()


@pytest.fixture
def exclusive_holder(tmp_path):
    process = start_holder(EXCLUSIVE_HOLDER, tmp_path)
    yield process
    stop(process)


@pytest.fixture
def shared_holder(tmp_path):
    process = start_holder(SHARED_HOLDER, tmp_path)
    yield process
    stop(process)


def start_waiting_thread(
    folder: Path,
    acquire: Callable[..., AbstractContextManager[None]] = device_lease.exclusive,
    work: Callable[[], None] = lambda: None,
) -> tuple[threading.Thread, threading.Event, list[str]]:
    """Start a thread that has to wait for the lease, and return when it waits.

    Returns:
        the thread, an event that is set after `work` in the lease, and its progress lines.
    """
    lines: list[str] = []
    waiting, acquired = threading.Event(), threading.Event()

    def run() -> None:
        with acquire(lambda line: (lines.append(line), waiting.set()), folder):
            work()
            acquired.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert waiting.wait(10)
    return thread, acquired, lines


def test_second_measurement_waits_and_names_holder(exclusive_holder, tmp_path):
    thread, acquired, lines = start_waiting_thread(tmp_path)
    assert not acquired.is_set()
    assert str(exclusive_holder.pid) in lines[0]
    exclusive_holder.stdin.close()
    thread.join(10)
    assert acquired.is_set()


def test_killed_holder_releases_device(exclusive_holder, tmp_path):
    thread, acquired, _ = start_waiting_thread(tmp_path)
    os.kill(exclusive_holder.pid, signal.SIGKILL)
    thread.join(10)
    assert acquired.is_set()


def test_failed_measurement_releases_device(tmp_path):
    with pytest.raises(ZeroDivisionError), device_lease.exclusive(lambda line: None, tmp_path):
        1 / 0  # noqa: B018
    lines: list[str] = []
    with device_lease.exclusive(lines.append, tmp_path):
        assert lines == []


def test_symlinked_lock_file_is_refused(tmp_path):
    folder = tmp_path / f"edgeopt-{os.getuid()}"
    folder.mkdir()
    (folder / "device.lock").symlink_to(tmp_path / "target")
    with pytest.raises(MeasureError, match="lease"), device_lease.exclusive(lambda line: None, tmp_path):
        pass
    assert not (tmp_path / "target").exists()


def test_shared_work_runs_concurrently(shared_holder, tmp_path):
    other = start_holder(SHARED_HOLDER, tmp_path)
    lines: list[str] = []
    with device_lease.shared(lines.append, tmp_path):
        assert lines == []
    stop(other)


@pytest.mark.parametrize("end_signal", [signal.SIGKILL, None], ids=["killed", "done"])
def test_measurement_waits_for_shared_work(shared_holder, tmp_path, end_signal):
    thread, acquired, lines = start_waiting_thread(tmp_path)
    assert not acquired.is_set()
    assert "compressing or building" in lines[0]
    if end_signal is None:
        shared_holder.stdin.close()
    else:
        os.kill(shared_holder.pid, end_signal)
    thread.join(10)
    assert acquired.is_set()


def test_shared_work_waits_for_measurement(exclusive_holder, tmp_path):
    thread, acquired, lines = start_waiting_thread(tmp_path, device_lease.shared)
    assert not acquired.is_set()
    assert f"process {exclusive_holder.pid} is measuring" in lines[0]
    exclusive_holder.stdin.close()
    thread.join(10)
    assert acquired.is_set()


def test_shared_work_queues_behind_waiting_measurement(shared_holder, tmp_path):
    measurement, measured, _ = start_waiting_thread(tmp_path)
    work, worked, _ = start_waiting_thread(tmp_path, device_lease.shared)
    assert not measured.is_set()
    assert not worked.is_set()
    shared_holder.stdin.close()
    for thread in (measurement, work):
        thread.join(10)
    assert measured.is_set()
    assert worked.is_set()


def test_nested_leases_never_wait(tmp_path):
    lines: list[str] = []
    with device_lease.shared(lines.append, tmp_path), device_lease.shared(lines.append, tmp_path):
        with (
            device_lease.exclusive(lines.append, tmp_path),
            device_lease.exclusive(lines.append, tmp_path),
            device_lease.shared(lines.append, tmp_path),
        ):
            pass
        thread, acquired, _ = start_waiting_thread(tmp_path)
        assert not acquired.is_set(), "the shared lock is held again after the nested measurement"
    thread.join(10)
    assert acquired.is_set()
    assert lines == []


def test_nested_shared_work_precedes_waiting_measurement(tmp_path):
    with device_lease.shared(lambda line: None, tmp_path):
        thread, acquired, _ = start_waiting_thread(tmp_path)
        with device_lease.shared(lambda line: None, tmp_path):
            assert not acquired.is_set()
    thread.join(10)
    assert acquired.is_set()


def test_nested_measurement_runs_after_waiting_one(tmp_path):
    order: list[str] = []
    with device_lease.shared(lambda line: None, tmp_path):
        thread, _, _ = start_waiting_thread(tmp_path, work=lambda: order.append("other"))
        with device_lease.exclusive(lambda line: None, tmp_path):
            order.append("own")
    thread.join(10)
    assert order == ["other", "own"]
