from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import trial_storages
from support.studies import dead_worker

from edgeopt.errors import StoreError
from edgeopt.machine import process_identity
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.worker_record import WorkerRecord
from edgeopt.search.workers.heartbeat import BEATS_PER_LEASE, Heartbeat, LivenessMonitor, create_worker_record

LEASE_S = 60.0


class Clock:
    """Clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def with_beat(worker: WorkerRecord, beat: int) -> WorkerRecord:
    return replace(worker, beat=beat)


def local_worker(pid: int) -> WorkerRecord:
    return replace(dead_worker(), process=process_identity.identity(pid))


def test_worker_records_have_unique_names() -> None:
    first, second = create_worker_record("all"), create_worker_record("build")
    assert first.worker != second.worker
    assert (first.host, first.process, first.code) == (second.host, second.process, second.code)
    assert (first.role, second.role) == ("all", "build")
    assert str(os.getpid()) in first.worker
    assert first.process.startswith(f"{os.getpid()}:")


def test_dead_local_process_is_found_at_once() -> None:
    monitor = LivenessMonitor(LEASE_S)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    worker = local_worker(process.pid)
    assert monitor.find_dead([worker]) == []
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and monitor.find_dead([worker]) == []:
        time.sleep(0.01)
    assert monitor.find_dead([worker]) == [worker], "a zombie process is dead"
    process.wait()
    assert monitor.find_dead([worker]) == [worker]


def test_reused_process_number_is_another_process() -> None:
    pid, start = create_worker_record("all").process.split(":")
    reused = replace(dead_worker(), process=f"{pid}:{int(start) - 1}")
    assert LivenessMonitor(LEASE_S).find_dead([reused, create_worker_record("all")]) == [reused]


def test_stopped_local_process_lives_until_lease_ends() -> None:
    clock = Clock()
    monitor, worker = LivenessMonitor(LEASE_S, clock=clock), create_worker_record("all")
    assert monitor.find_dead([worker]) == []
    clock.now += LEASE_S + 1
    assert monitor.find_dead([worker]) == [worker]


def test_remote_worker_is_dead_after_its_lease() -> None:
    clock = Clock()
    monitor, worker = LivenessMonitor(LEASE_S, clock=clock), trial_storages.remote_worker()
    for seconds in (0, LEASE_S / 2, LEASE_S / 2):
        clock.now += seconds
        assert monitor.find_dead([worker]) == []
    clock.now += 0.1
    assert monitor.find_dead([worker]) == [worker]
    assert monitor.find_dead([worker]) == [worker], "until it is reclaimed"


def test_heartbeat_renews_the_lease() -> None:
    clock = Clock()
    monitor, worker = LivenessMonitor(LEASE_S, clock=clock), trial_storages.remote_worker()
    for beat in range(5):
        clock.now += LEASE_S - 1
        assert monitor.find_dead([with_beat(worker, beat)]) == []
    clock.now += LEASE_S + 1
    assert monitor.find_dead([with_beat(worker, 4)]) == [with_beat(worker, 4)]
    assert monitor.find_dead([with_beat(worker, 5)]) == [], "the worker was slow"


def test_lease_starts_when_monitor_sees_the_worker() -> None:
    """A monitor cannot know how long a counter has been unchanged before."""
    clock = Clock()
    clock.now = 1e9
    monitor, worker = LivenessMonitor(LEASE_S, clock=clock), with_beat(trial_storages.remote_worker(), 12345)
    assert monitor.find_dead([worker]) == []
    clock.now += LEASE_S + 1
    assert monitor.find_dead([worker]) == [worker]


def test_leases_of_workers_are_independent() -> None:
    clock = Clock()
    monitor, old, young = (
        LivenessMonitor(LEASE_S, clock=clock),
        trial_storages.remote_worker("old"),
        trial_storages.remote_worker("young"),
    )
    monitor.find_dead([old])
    clock.now += LEASE_S - 1
    monitor.find_dead([old, young])
    clock.now += 2
    assert monitor.find_dead([old, young]) == [old]


@pytest.fixture
def storage(tmp_path: Path) -> TrialStorage:
    storage = trial_storages.open_study(file_url(tmp_path / "s.db"))
    storage.register_worker(trial_storages.remote_worker())
    return storage


def beat_of(storage: TrialStorage) -> int:
    return storage.active_workers()[0].beat


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_heartbeat_stops_with_the_worker(storage: TrialStorage) -> None:
    with Heartbeat(storage, "w", lease_s=BEATS_PER_LEASE * 0.05):
        wait_until(lambda: beat_of(storage) >= 3)
    last = beat_of(storage)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    time.sleep(0.15)
    assert beat_of(storage) == last


def test_heartbeat_stops_when_the_work_fails(storage: TrialStorage) -> None:
    with pytest.raises(ValueError, match="work"), Heartbeat(storage, "w", lease_s=60):
        raise ValueError("work")
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_lease_spans_several_heartbeats() -> None:
    assert BEATS_PER_LEASE >= 3, "one late heartbeat must not make a worker dead"


def test_heartbeat_stops_when_worker_is_reclaimed(storage: TrialStorage) -> None:
    with Heartbeat(storage, "w", lease_s=BEATS_PER_LEASE * 0.02) as heartbeat:
        storage.unregister_worker("w")
        wait_until(lambda: not heartbeat._thread.is_alive())


def test_heartbeat_stops_silently_without_database(
    storage: TrialStorage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(worker: str) -> bool:
        raise StoreError("the database is stopped")

    monkeypatch.setattr(storage, "beat", fail)
    with Heartbeat(storage, "w", lease_s=BEATS_PER_LEASE * 0.02) as heartbeat:
        wait_until(lambda: not heartbeat._thread.is_alive())
    assert capsys.readouterr().err == ""


def test_host_id_depends_on_kernel_and_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    this_host = process_identity.host_id()
    assert process_identity.host_id() == this_host
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("another boot\n")
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").write_text("")
    monkeypatch.setattr(process_identity, "_PROC", tmp_path)
    assert process_identity.host_id() != this_host
