"""What other processes do to a ledger in tests: each function is called by name in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from edgeopt.search.storage.summary import Summary
from edgeopt.search.storage.trial_store import Ledger, Member

STUDY = "s"
DEFINITION: dict[str, Any] = {"objectives": [["m", "minimize"]], "limits": [], "parameters": {"x": {"choices": [1]}}}


def opened(url: str, study: str = STUDY) -> Ledger:
    made = Ledger(url, study)
    made.open(DEFINITION, {"name": "sweep"})
    return made


def member(worker: str = "w", *, host: str = "another host", code: str = "1+a", role: str = "all") -> Member:
    """A worker of another host, whom only its counter can tell."""
    return Member(worker=worker, host=host, process="1:1", role=role, code=code, beat=0)


def race(count: int, task: Callable[..., None], *arguments: Any) -> list[Any]:
    """What `count` processes answer that begin `task(begin, answers, n, *arguments)` at once."""
    context = multiprocessing.get_context("spawn")
    begin, answers = context.Barrier(count), context.SimpleQueue()
    processes: list[BaseProcess] = [
        context.Process(target=task, args=(begin, answers, n, *arguments)) for n in range(count)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


def open_at_once(begin: Any, answers: Any, n: int, url: str) -> None:
    made = Ledger(url, STUDY)
    begin.wait()
    try:
        made.open(DEFINITION, {"name": f"{n}"})
        answers.put("")
    except Exception as error:
        answers.put(repr(error))


def add_all(begin: Any, answers: Any, n: int, url: str, recipes: int, budget: int | None = None) -> None:
    """Try to add every recipe, each process in another order; answers with those that it added."""
    made = opened(url)
    mine = random.Random(n).sample(range(recipes), recipes)
    begin.wait()
    added = [made.add({"x": x}, origin="sampled", worker=f"w{n}", state="running", budget=budget) for x in mine]
    answers.put([row.params["x"] for row in added if row is not None])


def work_off(begin: Any, answers: Any, n: int, url: str) -> None:
    """Claim and finish until nothing waits; answers with the numbers of the trials."""
    made, taken = opened(url), []
    begin.wait()
    while (row := made.claim(f"w{n}")) is not None:
        taken.append(row.number)
        assert made.finish(row, "finished", Summary(metrics={"m": float(n)}), {"by": n})
    answers.put(taken)


def work_for_ever(url: str, worker: str) -> None:
    """Everything that a worker does to its ledger, until it is killed."""
    made, chance = opened(url), random.Random(os.getpid())
    made.join(member(worker))
    while True:
        row = made.claim(worker) or made.add(
            {"x": chance.random()}, origin="sampled", worker=worker, state="running", hints={"h": 1}
        )
        assert row is not None
        made.beat(worker)
        if chance.random() < 0.2:
            made.release(row)
        else:
            made.finish(row, "finished", Summary(metrics={"m": 1.0}), {"number": row.number, "big": "x" * 20_000})
            made.annotate(row, run_id=f"run {row.number}/{row.attempt}")


def killed_at_work(url: str, worker: str, after_s: float) -> None:
    """Have a process work, and kill it `after_s` after its first trial was seen."""
    process = multiprocessing.get_context("spawn").Process(target=work_for_ever, args=(url, worker))
    process.start()
    made = opened(url)
    while not any(row.worker == worker for row in made.changes(0)):
        assert process.is_alive()
        time.sleep(0.02)
    time.sleep(after_s)
    process.kill()
    process.join()
