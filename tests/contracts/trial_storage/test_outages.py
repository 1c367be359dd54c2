"""Contract of TrialStorage: restarts, locks and failures of the database."""

from __future__ import annotations

import itertools
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.postgresql import Postgres
from support.trial_storages import (
    STUDY,
    SUMMARY,
    add_finished_trial,
    add_trial,
    open_study,
    remote_worker,
)

from edgeopt.errors import StoreError
from edgeopt.search.storage import database
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.trial_summary import TrialSummary


def test_restarts_lose_and_duplicate_nothing(postgresql: Postgres) -> None:
    url, messages = postgresql.database(), []
    open_study(url)
    stop, failures = threading.Event(), []

    def work(index: int) -> None:
        storage = TrialStorage(url, STUDY, on_message=messages.append)
        storage.register_worker(remote_worker(f"w{index}"))
        try:
            for x in itertools.count():
                if stop.is_set():
                    return
                trial = storage.add({"x": [index, x]}, origin="sampled", worker=f"w{index}", state="running")
                assert trial is not None, "it was added before"
                assert storage.finish(trial, "finished", SUMMARY, {"x": [index, x]})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for mode in ("immediate", "fast"):
        time.sleep(0.3)
        postgresql.restart(mode)
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert messages, "the retry is reported"
    storage = open_study(url)
    trials = storage.trials_since(0)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    for index in range(3):
        added = [trial.params["x"][1] for trial in trials if trial.worker == f"w{index}"]
        assert added == list(range(len(added))) != []
    assert {trial.state for trial in trials} == {"finished"}
    assert [storage.load_result(trial.number) for trial in trials] == [trial.params for trial in trials]


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_interrupted_transaction_is_repeated_completely(postgresql: Postgres, mode: str) -> None:
    storage = open_study(postgresql.database())
    storage.register_worker(remote_worker("w"))
    running, _ = add_trial(storage, 0, "w"), add_finished_trial(storage, 1, "w")
    restarts = iter([lambda: postgresql.restart(mode)])

    def restart_once(trial: Trial) -> TrialSummary:
        """Restart the database in the middle of the transaction, after the worker was marked as dead."""
        next(restarts, lambda: None)()
        return TrialSummary(failure="failed")

    (dead,) = storage.active_workers()
    assert storage.reclaim(dead, new_owner="new owner", max_attempts=1, summarize_failure=restart_once) == [running]
    assert next(restarts, None) is None
    assert [(t.state, t.worker) for t in storage.trials_since(0)] == [("failed", "w"), ("finished", "new owner")]


def test_stopped_database_is_one_error_without_password(postgresql: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RETRY_S", 1.0)
    messages: list[str] = []
    url = open_study(postgresql.database().replace("edgeopt@", "edgeopt:secret@")).url
    storage = TrialStorage(url, STUDY, on_message=messages.append)
    assert storage.trials_since(0) == [], "the database has answered once"
    postgresql.stop()
    try:
        started = time.monotonic()
        with pytest.raises(StoreError) as caught:
            add_trial(storage)
        assert 1.0 <= time.monotonic() - started < 5
    finally:
        postgresql.start()
    line = str(caught.value)
    assert f"edgeopt:***@127.0.0.1:{postgresql.port}/" in line
    assert "EDGEOPT_STORE" in line
    assert len(messages) == 1, "retries are reported once"
    assert "secret" not in " ".join([line, *messages])
    assert add_trial(storage).number == 0, "the same storage works again"


def test_locked_file_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_SQLITE_LOCK_S", 0.1)
    messages: list[str] = []
    storage = TrialStorage(open_study(file_url(tmp_path / "s.db")).url, STUDY, on_message=messages.append)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    timer.start()
    assert add_trial(storage).number == 0
    timer.join()
    assert any("locked" in line for line in messages)


def test_readers_do_not_wait_for_writers(tmp_path: Path) -> None:
    storage = open_study(file_url(tmp_path / "s.db"))
    add_trial(storage)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert len(storage.trials_since(0)) == 1
    assert time.monotonic() - started < 1
    other.close()


UNUSABLE: dict[str, Callable[[Path], str]] = {
    "not in a folder": lambda folder: f"sqlite:///{folder}/file/s.db",
    "not a database": lambda folder: f"sqlite:///{folder}/file",
    "a folder": lambda folder: f"sqlite:///{folder}",
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_file_is_an_error_at_once(tmp_path: Path, fault: str) -> None:
    (tmp_path / "file").write_text("this is not a database " * 100)
    with pytest.raises(StoreError) as caught:
        open_study(UNUSABLE[fault](tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "file").read_text().startswith("this is")
