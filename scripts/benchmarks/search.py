"""Benchmarks of the search: what its machinery costs, what it survives, and how soon it finds the front."""

from __future__ import annotations

import collections
import os
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from benchmarks.common import EDGEOPT, cli, intervals, only, workers_of
from edgeopt.config.assemble import Request
from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import Measurement, TrialResult, Verdict
from edgeopt.search.storage.trial import DONE, Row
from edgeopt.search.storage.trial_store import Ledger, studies
from edgeopt.search.workers import loop
from edgeopt.search.workers.subprocess_evaluator import Evaluator
from edgeopt.search.workers.tracking_outbox import Delivery
from edgeopt.studies.open_study import OpenStudy

SPACE = {
    "step.quantize.block_size": {"choices": [32, 64, 128]},
    "step.prune.ratio": {"low": 0.1, "high": 0.5},
    "step.prune.windows": {"low": 1, "high": 64},
}
METRICS = {"quality/perplexity": "", "latency/decode_p50_ms": "ms", "size/engine_mib": "MiB"}
COMMON = {f"metric/{n}": "" for n in range(30)}
"""Figures beside the objectives, as many as a real trial has."""


def nothing(params: Mapping[str, Any], progress: Callable[[str], None]) -> TrialResult:
    """An evaluation that takes no time; its figures follow from its parameters."""
    chance = random.Random(str(sorted(params.items())))
    figures = {metric: chance.random() for metric in (*METRICS, *COMMON)}
    measured = tuple(
        Measurement(metric=m, unit=METRICS.get(m, ""), value=v, low=v, high=v, count=1, method="invented")
        for m, v in figures.items()
    )
    size = figures["size/engine_mib"]
    verdict = Verdict(
        metric="size/engine_mib",
        limit="at most 0.5 MiB",
        bound=0.5,
        value=size,
        excess=size / 0.5 - 1,
        kept=size <= 0.5,
        reason="" if size <= 0.5 else "above",
    )
    return TrialResult(
        recipe={"text": "nothing", "digest": "0" * 64},
        target="bench",
        device={"name": "bench"},
        emulated=False,
        measurements=measured,
        verdicts=(verdict,),
        timings_s={"measure": 0.001},
    )


class Silent:
    """Shows nothing."""

    def started(self, row: Row) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, row: Row, result: TrialResult) -> None: ...

    def told(self, line: str) -> None: ...


def empty_study(folder: Path, store: str | None, *, tracking_uri: str = "", **more: Any) -> OpenStudy:
    """A study of invented evaluations that is logged into an MLflow store of its own, or the given one."""
    uri = tracking_uri or f"sqlite:///{folder}/mlflow.db"
    request = Request(
        name="reference",
        overrides=(
            "recipe=prune_int4",
            "measure.stop_early=false",  # nothing is foreseen
            f"state='{folder}'",
            f"tracking.tracking_uri='{uri}'",
            "limits={size: {engine_mib: 0.5 MiB}}",
        ),
    )
    config = request.compose()
    config["search"] |= {"parameters": SPACE, "enqueue": [], "study": f"empty-{random.randrange(10**9)}", **more}
    opened = OpenStudy.of(request, config, store=store)
    opened.recorder.connect()
    opened.recorder.open_study(opened.name, config, {})
    opened.open()
    return opened


def work(opened: OpenStudy, evaluator: Evaluator) -> None:
    """One worker, until the study is over."""
    blank = nothing({}, print)
    loop.run(
        loop.Sweep(
            study=opened.study,
            evaluator=evaluator,
            log=opened.log(),
            watcher=Silent(),
            blank=lambda _: replace(blank, measurements=(), verdicts=()),
        )
    )


def machinery(folder: Path) -> None:
    """What a trial costs beside its evaluation: asking, keeping and logging 100 that take no time.

    MLflow alone beside it: its own client that logs the same params, metrics and tags into the same store.
    """
    from support.postgresql import server

    with server() as postgresql, closing(Evaluator(nothing, timeout_s=60)) as evaluator:
        for name, store in (("SQLite", None), ("PostgreSQL", postgresql.database())):
            opened = empty_study(folder / name, store, trials=10)
            work(opened, evaluator)
            opened.study.search = replace(opened.study.search, trials=110)
            begun = time.perf_counter()
            work(opened, evaluator)
            trial_ms = 10 * (time.perf_counter() - begun)
            print(f"{name}: {trial_ms:.0f} ms a trial; MLflow alone takes {_mlflow_ms(opened):.0f} ms", flush=True)
    print()


def _mlflow_ms(opened: OpenStudy) -> float:
    """What MLflow's client takes to make a run with all that a trial's has, and to end it; the median of 30."""
    client, taken = MlflowClient(tracking_uri=opened.recorder.uri), []
    run = client.get_run(opened.recorder.runs(opened.name)[0])
    metrics = [Metric(name, value, 0, 0) for name, value in run.data.metrics.items()]
    params = [Param(name, value) for name, value in run.data.params.items()]
    for _ in range(30):
        begun = time.perf_counter()
        run_id = client.create_run(run.info.experiment_id, tags=run.data.tags).info.run_id
        client.log_batch(run_id, metrics=metrics, params=params)
        client.set_terminated(run_id)
        taken.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(taken)


def filled(opened: OpenStudy, count: int) -> None:
    """Give a study so many finished trials, of which MLflow knows nothing."""
    study, chance = opened.study, random.Random(0)
    space = study.search.space
    while len(study._rows) < count:
        params = space.draw(chance)
        row = study.ledger.add(params, origin="sampled", worker="bench", state="running")
        if row is not None:
            study.finish(row, nothing(params, print))
            study.ledger.annotate(row, run_id="0" * 32)
            study._rows[row.number] = row


def ten_thousand(folder: Path) -> None:
    """A study of 10,000 finished trials: the next one, `edgeopt front`, and memory."""
    opened = empty_study(folder, None, trials=10_000 + 20)
    begun = time.perf_counter()
    filled(opened, 10_000)
    print(f"10,000 trials kept in {time.perf_counter() - begun:.0f} s")
    again = empty_study_of(opened)
    begun = time.perf_counter()
    delivery = Delivery(again.study, again.log(), print)
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        row = again.study.ask()
        assert row is not None
        delivery.begin(row)
        again.study.finish(row, nothing(row.params, print))
        delivery.deliver()
        times.append(time.perf_counter() - begun)
    print(f"asking, telling and logging: first {times[0]:.2f} s, then {statistics.median(times[1:]):.2f} s a trial")
    begun = time.perf_counter()
    again.front()
    print(f"front: {time.perf_counter() - begun:.2f} s")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB\n")


def empty_study_of(opened: OpenStudy) -> OpenStudy:
    """The same study, as another process would open it."""
    study = replace(opened.study)
    study.worker = "later"
    return replace(opened, study=study)


def kills(folder: Path) -> None:
    """Four workers over PostgreSQL: 30 random kill -9 and one restart of the database during a sweep."""
    from support.postgresql import server

    chance = random.Random(int(time.time()))
    measured = [*only("memory", "latency"), "target.threads=1"]  # no host's placement of virtual cores changes its time
    with server() as postgresql:
        store = postgresql.database()
        environment = {**os.environ, "EDGEOPT_STORE": store}
        command = [EDGEOPT, "sweep", "workers=4", "search.study=kills", "search.trials=24", "promote=null"]
        command += ["limits.size.engine_mib=null", "limits.quality.perplexity_ratio=null", *measured]
        objectives = "{quality/perplexity: null}"
        command += [f"search.objectives={objectives}", "search.lease_s=20", "--json"]
        with (folder / "front.json").open("wb") as out, (folder / "said").open("wb") as said:
            sweep = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=said)
        ledger = opened_ledger(store, sweep)
        killed, seen = 0, {}
        while sweep.poll() is None:
            time.sleep(chance.uniform(2, 8))
            workers = workers_of(sweep.pid)
            if killed == 15:
                print("restarting the database", flush=True)
                postgresql.stop()
                time.sleep(5)
                postgresql.start()
            if killed < 30 and workers:
                over = {row.number: row.summary for row in ledger.changes(0) if row.state in DONE}
                assert seen.items() <= over.items(), "a finished trial was lost or changed"
                seen = over
                chance.choice(workers).kill()
                killed += 1
        rows = ledger.changes(0)
        states = collections.Counter(row.state for row in rows)
        lost = sum(row.attempt - 1 for row in rows)
        print(f"{killed} workers killed: exit {sweep.returncode}, trials {dict(states)}, {lost} attempts lost")
        assert not [row for row in rows if row.state == "running" or (row.state in DONE and not row.recorded)]
        runs = trial_runs(folder)
        status = collections.Counter(run.info.status for run in runs)
        ended = collections.Counter(run.data.tags[tags.TRIAL] for run in runs if run.info.status == "FINISHED")
        keys = collections.Counter((run.data.tags[tags.TRIAL], run.data.tags[tags.ATTEMPT]) for run in runs)
        twice = sum(1 for count in [*ended.values(), *keys.values()] if count > 1)
        print(f"runs in MLflow: {dict(status)}; logged twice: {twice}")
        agree = []
        for row in rows:
            if row.state == "finished":
                result = ledger.result(row.number)
                quiet = cli(folder, "bench", "--engine", result["engine"]["directory"], *measured)
                metric = "latency/decode_p50_ms"
                low, high = intervals({"measurements": result["measurements"]}, metric)
                again = intervals(quiet, metric)
                agree.append(low <= again[1] and again[0] <= high)
        print(f"{sum(agree)} of {len(agree)} decode latencies agree with those of a quiet machine\n")


def opened_ledger(url: str, sweep: subprocess.Popen[bytes]) -> Ledger:
    """The ledger of the study of `kills`, once the sweep has opened it."""
    while "kills" not in studies(url):
        assert sweep.poll() is None, "the sweep ended before it began"
        time.sleep(0.5)
    return Ledger(url, "kills")


def trial_runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return [run for run in client.search_runs(experiments, max_results=1000) if tags.TRIAL in run.data.tags]
