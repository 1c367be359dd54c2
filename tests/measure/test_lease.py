from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeopt.errors import MeasureError
from edgeopt.measure import lease

HOLDER = """
import sys, pathlib
from edgeopt.measure import lease
with lease.hold(lambda line: None, pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    root = Path(lease.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def wait_for(folder: Path) -> tuple[threading.Thread, threading.Event, list[str]]:
    """A thread that takes the lease, the event that it did, and what it said while it waited."""
    said: list[str] = []
    waiting, held = threading.Event(), threading.Event()

    def take() -> None:
        with lease.hold(lambda line: (said.append(line), waiting.set()), folder):
            held.set()

    thread = threading.Thread(target=take)
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
    with pytest.raises(ZeroDivisionError), lease.hold(lambda line: None, tmp_path):
        1 / 0  # noqa: B018
    said: list[str] = []
    with lease.hold(said.append, tmp_path):
        assert said == []


def test_a_lock_that_points_elsewhere_is_refused(tmp_path):
    folder = tmp_path / f"edgeopt-{os.getuid()}"
    folder.mkdir()
    (folder / "device.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(MeasureError, match="lease"), lease.hold(lambda line: None, tmp_path):
        pass
    assert not (tmp_path / "precious").exists()
