"""Contract of TrialStorage on every database: readers see every change once, also with concurrent writers."""

from __future__ import annotations

import itertools
import json
import random
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import trial_storages
from support.trial_storages import (
    RESULT,
    STUDY,
    SUMMARY,
    add_trial,
    open_study,
    reclaim_worker,
    remote_worker,
    run_concurrently,
)

from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial import ENDED_STATES, Trial
from edgeopt.search.storage.trial_storage import TrialStorage


def test_only_changed_trials_are_returned(storage: TrialStorage) -> None:
    trials = [add_trial(storage, x, "w") for x in range(3)]
    revision = max(trial.revision for trial in storage.trials_since(0))
    assert storage.trials_since(revision) == []
    for trial in (trials[2], trials[0]):
        storage.finish(trial, "finished", SUMMARY, RESULT)
    assert [trial.number for trial in storage.trials_since(revision)] == [0, 2], "by number, not by time"


class Reader:
    """Copy of the trials that only reads changes."""

    def __init__(self, storage: TrialStorage) -> None:
        self.storage, self.revision = storage, 0
        self.trials: dict[int, Trial] = {}
        self.changes: list[tuple[int, int]] = []

    def update(self) -> None:
        for trial in self.storage.trials_since(self.revision):
            self.changes.append((trial.number, trial.revision))
            self.trials[trial.number] = trial
        self.revision = max([self.revision, *(trial.revision for trial in self.trials.values())])


operations = st.sampled_from(
    ["add", "start", "claim", "claim built", "finish", "build", "release", "record", "discard", "reclaim"]
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_changes_add_up_to_the_current_state(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = file_url(tmp_path / "s.db") if kind == "sqlite" else request.getfixturevalue("postgresql").database()

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(
        script=st.lists(st.tuples(operations, st.integers(0, 1), st.booleans()), max_size=25), seed=st.integers(0, 99)
    )
    def check(script: list[tuple[str, int, bool]], seed: int) -> None:
        storage, rng = open_study(url, uuid.uuid4().hex), random.Random(seed)
        reader, generation = Reader(storage), itertools.count()
        workers = [f"{next(generation)}-{storage.study}" for _ in range(2)]
        for worker in workers:
            storage.register_worker(remote_worker(worker))
        for operation, index, update in script:
            execute(storage, operation, workers, index, rng, generation)
            require_consistent(storage.trials_since(0))
            if update:
                reader.update()
        reader.update()
        assert sorted(reader.trials.items()) == [(trial.number, trial) for trial in storage.trials_since(0)]
        assert len(reader.changes) == len(set(reader.changes)), "no change is returned twice"

    check()


def execute(
    storage: TrialStorage,
    operation: str,
    workers: list[str],
    index: int,
    rng: random.Random,
    generation: Iterator[int],
) -> None:
    """Execute an operation as the worker at `index` and check its result; skip it if it does not apply."""
    trials, worker = storage.trials_since(0), workers[index]
    own = next((trial for trial in trials if trial.state == "running" and trial.worker == worker), None)
    x = rng.randrange(6)
    match operation:
        case "add":
            trial = storage.add({"x": x}, origin="enqueued")
            assert (trial is None) == any(t.params == {"x": x} for t in trials)
        case "start" if own is None:
            storage.add({"x": x}, origin="sampled", worker=worker, state="running")
        case "claim":
            trial = storage.claim(worker)
            assert (trial is None) == (own is None and not any(t.state == "waiting" for t in trials))
        case "claim built":
            trial = storage.claim(worker, built=True)
            assert (trial is None) == (own is None and not any(t.state == "waiting" and t.built for t in trials))
        case "finish" if own is not None:
            assert storage.finish(own, "finished", SUMMARY, RESULT)
        case "build" | "release" if own is not None:
            assert storage.release(own, built=operation == "build")
        case "record" if trials:
            recorded = rng.choice(trials)
            storage.mark_recorded(recorded, run_id=f"{recorded.number}/{recorded.attempt}")
        case "discard" if trials:
            ended = [trial for trial in trials if trial.state in ENDED_STATES]
            if ended:
                storage.discard_result(rng.choice(ended))
        case "reclaim":
            interrupted = reclaim_worker(storage, worker, new_owner=workers[1 - index])
            assert [trial.number for trial in interrupted] == ([] if own is None else [own.number])
            assert (own is None) or not storage.finish(own, "finished", SUMMARY, RESULT)
            workers[index] = f"{next(generation)}-{storage.study}"
            storage.register_worker(remote_worker(workers[index]))


def require_consistent(trials: list[Trial]) -> None:
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len({json.dumps(trial.params) for trial in trials}) == len(trials)
    busy = [trial.worker for trial in trials if trial.state == "running"]
    assert len(busy) == len(set(busy)), "a worker runs one trial"
    for trial in trials:
        assert (trial.summary is not None) == (trial.ended_s is not None) == (trial.state in ENDED_STATES)
        assert not trial.run_id or trial.run_id == f"{trial.number}/{trial.attempt}"


# several processes


def test_concurrent_adds_store_each_recipe_once(url: str) -> None:
    open_study(url)
    reader, recipes = Reader(TrialStorage(url, STUDY)), 40
    with updating(reader):
        answers = run_concurrently(4, trial_storages.add_all, url, recipes)
    assert sorted(x for added in answers for x in added) == list(range(recipes))
    trials = open_study(url).trials_since(0)
    assert [trial.number for trial in trials] == list(range(recipes))
    assert sorted(trial.params["x"] for trial in trials) == list(range(recipes))
    require_each_change_once(reader, trials)


def test_concurrent_adds_keep_the_budget(url: str) -> None:
    storage = open_study(url)
    for x in (-1, -2):
        add_trial(storage, x, state="refused")
    answers = run_concurrently(4, trial_storages.add_all, url, 40, 15)
    assert len(list(itertools.chain(*answers))) == 15
    assert len(storage.trials_since(0)) == 17, "refused trials do not count"


def test_concurrent_claims_are_exclusive(url: str) -> None:
    storage, count = open_study(url), 40
    for x in range(count):
        add_trial(storage, x)
    reader = Reader(TrialStorage(url, STUDY))
    with updating(reader):
        answers = run_concurrently(4, trial_storages.finish_all, url)
    assert sorted(itertools.chain(*answers)) == list(range(count))
    owners = {number: index for index in range(4) for number in answers[index]}
    assert len(owners) == count
    trials = storage.trials_since(0)
    assert {trial.state for trial in trials} == {"finished"}
    for trial in trials:
        assert storage.load_result(trial.number) == {"by": int(trial.worker[1:])}
    require_each_change_once(reader, trials)


@contextmanager
def updating(reader: Reader) -> Iterator[None]:
    """Update the reader continuously inside the block, and once after it."""
    stop = threading.Event()

    def update() -> None:
        while not stop.wait(0.002):
            reader.update()

    thread = threading.Thread(target=update)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        reader.update()


def require_each_change_once(reader: Reader, trials: list[Trial]) -> None:
    assert sorted(reader.trials.values(), key=lambda trial: trial.number) == trials
    assert len(reader.changes) == len(set(reader.changes))
