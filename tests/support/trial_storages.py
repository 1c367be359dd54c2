"""Build studies, trials and workers for tests of the trial storage, and run functions in several processes.

Functions that run in another process are defined here, because `spawn` imports them by name.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.storage.worker_record import WorkerRecord

STUDY = "s"
DEFINITION: dict[str, Any] = {"objectives": [["m", "minimize"]], "limits": [], "parameters": {"x": {"choices": [1]}}}
SUMMARY = TrialSummary(feasible=True, metrics={"m": 0.5}, timings_s={"build": 1.5}, energy_j=2.0)
RESULT = {"recipe": {"text": "int4"}, "measurements": []}


def open_study(url: str, study: str = STUDY) -> TrialStorage:
    """Return the storage of a study; create the study if it does not exist."""
    storage = TrialStorage(url, study)
    storage.open(DEFINITION, {"name": "sweep"})
    return storage


def add_trial(storage: TrialStorage, x: object = 0, worker: str = "", **fields: Any) -> Trial:
    """Add a trial: running if it has a worker, otherwise waiting."""
    state = fields.pop("state", "running" if worker else "waiting")
    trial = storage.add({"x": x}, origin="sampled", worker=worker, state=state, **fields)
    assert trial is not None
    return trial


def add_finished_trial(storage: TrialStorage, x: object = 0, worker: str = "w") -> Trial:
    """Add a finished trial with SUMMARY and RESULT."""
    trial = add_trial(storage, x, worker)
    assert storage.finish(trial, "finished", SUMMARY, RESULT)
    return read_trial(storage, trial.number)


def read_trial(storage: TrialStorage, number: int) -> Trial:
    """Return the current state of a trial."""
    return next(trial for trial in storage.trials_since(0) if trial.number == number)


def reclaim_worker(
    storage: TrialStorage, worker: str, *, new_owner: str = "new owner", max_attempts: int = 3
) -> list[Trial]:
    """Take over the trials of a worker as if it had died."""
    (dead,) = [record for record in storage.active_workers() if record.worker == worker]
    return storage.reclaim(
        dead,
        new_owner=new_owner,
        max_attempts=max_attempts,
        summarize_failure=lambda trial: TrialSummary(failure=f"{trial.attempt} attempts"),
    )


def remote_worker(
    worker: str = "w", *, host: str = "another host", code: str = "1+a", role: str = "all"
) -> WorkerRecord:
    """Return a worker of another host. Only its heartbeat counter shows that it is alive."""
    return WorkerRecord(worker=worker, host=host, process="1:1", role=role, code=code, beat=0)


def run_concurrently(count: int, task: Callable[..., None], *arguments: Any) -> list[Any]:
    """Run `task(barrier, answers, index, *arguments)` in `count` processes and return their answers."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(count), context.SimpleQueue()
    processes: list[BaseProcess] = [
        context.Process(target=task, args=(barrier, answers, index, *arguments)) for index in range(count)
    ]
    for process in processes:
        process.start()
    collected = [answers.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return collected


def open_concurrently(barrier: Any, answers: Any, index: int, url: str) -> None:
    """Open the study at the same time as other processes; answer with the error or an empty string."""
    storage = TrialStorage(url, STUDY)
    barrier.wait()
    try:
        storage.open(DEFINITION, {"name": f"{index}"})
        answers.put("")
    except Exception as error:
        answers.put(repr(error))


def add_all(barrier: Any, answers: Any, index: int, url: str, recipes: int, budget: int | None = None) -> None:
    """Try to add every recipe in random order; answer with the recipes that this process added."""
    storage = open_study(url)
    order = random.Random(index).sample(range(recipes), recipes)
    barrier.wait()
    trials = [
        storage.add({"x": x}, origin="sampled", worker=f"w{index}", state="running", budget=budget) for x in order
    ]
    answers.put([trial.params["x"] for trial in trials if trial is not None])


def finish_all(barrier: Any, answers: Any, index: int, url: str) -> None:
    """Claim and finish trials until none waits; answer with their numbers."""
    storage, claimed = open_study(url), []
    barrier.wait()
    while (trial := storage.claim(f"w{index}")) is not None:
        claimed.append(trial.number)
        summary = TrialSummary(metrics={"m": float(index)})
        assert storage.finish(trial, "finished", summary, {"by": index})
    answers.put(claimed)


def work_forever(url: str, worker: str) -> None:
    """Run all operations of a worker until the process is killed."""
    storage, rng = open_study(url), random.Random(os.getpid())
    storage.register_worker(remote_worker(worker))
    while True:
        trial = storage.claim(worker) or storage.add(
            {"x": rng.random()}, origin="sampled", worker=worker, state="running", sampler_attrs={"h": 1}
        )
        assert trial is not None
        storage.beat(worker)
        if rng.random() < 0.2:
            storage.release(trial)
        else:
            result = {"number": trial.number, "big": "x" * 20_000}
            storage.finish(trial, "finished", TrialSummary(metrics={"m": 1.0}), result)
            storage.mark_recorded(trial, run_id=f"run {trial.number}/{trial.attempt}")


def kill_working_process(url: str, worker: str, after_s: float) -> None:
    """Start a working process and kill it `after_s` seconds after its first trial appears."""
    process = multiprocessing.get_context("spawn").Process(target=work_forever, args=(url, worker))
    process.start()
    storage = open_study(url)
    while not any(trial.worker == worker for trial in storage.trials_since(0)):
        assert process.is_alive()
        time.sleep(0.02)
    time.sleep(after_s)
    process.kill()
    process.join()
