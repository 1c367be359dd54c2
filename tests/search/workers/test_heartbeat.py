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
from support.studies import dead_member

from edgeopt.errors import StoreError
from edgeopt.machine import process_identity
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.worker_record import WorkerRecord
from edgeopt.search.workers.heartbeat import BEATS_PER_LEASE, Heartbeat, LivenessMonitor, create_worker_record

LEASE_S = 60.0


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def beaten(member: WorkerRecord, beat: int) -> WorkerRecord:
    return replace(member, beat=beat)


def on_this_host(number: int) -> WorkerRecord:
    return replace(dead_member(), process=process_identity.identity(number))


def test_a_worker_is_told_from_every_other() -> None:
    one, two = create_worker_record("all"), create_worker_record("build")
    assert one.worker != two.worker
    assert (one.host, one.process, one.code) == (two.host, two.process, two.code)
    assert (one.role, two.role) == ("all", "build")
    assert str(os.getpid()) in one.worker
    assert one.process.startswith(f"{os.getpid()}:")


def test_a_process_that_died_on_this_host_is_found_at_once() -> None:
    watch = LivenessMonitor(LEASE_S)
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    member = on_this_host(started.pid)
    assert watch.find_dead([member]) == []
    started.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and watch.find_dead([member]) == []:
        time.sleep(0.01)
    assert watch.find_dead([member]) == [member], "it is dead though nobody has waited for it yet"
    started.wait()
    assert watch.find_dead([member]) == [member]


def test_a_process_number_that_is_used_again_is_another_process() -> None:
    number, start = create_worker_record("all").process.split(":")
    again = replace(dead_member(), process=f"{number}:{int(start) - 1}")
    assert LivenessMonitor(LEASE_S).find_dead([again, create_worker_record("all")]) == [again]


def test_a_stopped_process_of_this_host_lives_as_long_as_its_lease() -> None:
    clock = Clock()
    watch, member = LivenessMonitor(LEASE_S, clock=clock), create_worker_record("all")
    assert watch.find_dead([member]) == []
    clock.now += LEASE_S + 1
    assert watch.find_dead([member]) == [member]


def test_a_counter_that_stands_still_elsewhere_is_dead_after_the_lease_alone() -> None:
    clock = Clock()
    watch, member = LivenessMonitor(LEASE_S, clock=clock), trial_storages.remote_worker()
    for seconds in (0, LEASE_S / 2, LEASE_S / 2):
        clock.now += seconds
        assert watch.find_dead([member]) == []
    clock.now += 0.1
    assert watch.find_dead([member]) == [member]
    assert watch.find_dead([member]) == [member], "until it is buried"


def test_every_beat_renews_the_lease() -> None:
    clock = Clock()
    watch, member = LivenessMonitor(LEASE_S, clock=clock), trial_storages.remote_worker()
    for beat in range(5):
        clock.now += LEASE_S - 1
        assert watch.find_dead([beaten(member, beat)]) == []
    clock.now += LEASE_S + 1
    assert watch.find_dead([beaten(member, 4)]) == [beaten(member, 4)]
    assert watch.find_dead([beaten(member, 5)]) == [], "it was only slow"


def test_no_other_clock_counts_and_a_watch_starts_with_what_it_sees_first() -> None:
    """A watch that begins when the counter has stood still for hours cannot know that."""
    clock = Clock()
    clock.now = 1e9
    watch, member = LivenessMonitor(LEASE_S, clock=clock), beaten(trial_storages.remote_worker(), 12345)
    assert watch.find_dead([member]) == []
    clock.now += LEASE_S + 1
    assert watch.find_dead([member]) == [member]


def test_each_worker_has_a_lease_of_its_own() -> None:
    clock = Clock()
    watch, old, young = (
        LivenessMonitor(LEASE_S, clock=clock),
        trial_storages.remote_worker("old"),
        trial_storages.remote_worker("young"),
    )
    watch.find_dead([old])
    clock.now += LEASE_S - 1
    watch.find_dead([old, young])
    clock.now += 2
    assert watch.find_dead([old, young]) == [old]


@pytest.fixture
def storage(tmp_path: Path) -> TrialStorage:
    made = trial_storages.open_study(file_url(tmp_path / "s.db"))
    made.register_worker(trial_storages.remote_worker())
    return made


def beat_of(storage: TrialStorage) -> int:
    return storage.active_workers()[0].beat


def hold(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_heart_beats_while_the_worker_works_and_stops_with_it(storage: TrialStorage) -> None:
    with Heartbeat(storage, "w", lease_s=BEATS_PER_LEASE * 0.05):
        hold(lambda: beat_of(storage) >= 3)
    last = beat_of(storage)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    time.sleep(0.15)
    assert beat_of(storage) == last


def test_a_heart_stops_also_when_the_work_fails(storage: TrialStorage) -> None:
    with pytest.raises(ValueError, match="work"), Heartbeat(storage, "w", lease_s=60):
        raise ValueError("work")
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_heart_beats_several_times_a_lease() -> None:
    assert BEATS_PER_LEASE >= 3, "one beat that is late must not be the death of a worker"


def test_the_heart_of_a_buried_worker_stops(storage: TrialStorage) -> None:
    with Heartbeat(storage, "w", lease_s=BEATS_PER_LEASE * 0.02) as heart:
        storage.unregister_worker("w")
        hold(lambda: not heart._thread.is_alive())


def test_a_heart_without_a_store_stops_without_a_word(
    storage: TrialStorage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(worker: str) -> bool:
        raise StoreError("gone")

    monkeypatch.setattr(storage, "beat", gone)
    with Heartbeat(storage, "w", lease_s=BEATS_PER_LEASE * 0.02) as heart:
        hold(lambda: not heart._thread.is_alive())
    assert capsys.readouterr().err == ""


def test_hosts_are_told_apart_by_kernel_and_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = process_identity.host_id()
    assert process_identity.host_id() == here
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("another boot\n")
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").write_text("")
    monkeypatch.setattr(process_identity, "_PROC", tmp_path)
    assert process_identity.host_id() != here
