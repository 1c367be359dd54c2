"""Benchmark the search: overhead per trial, large studies, and recovery from killed workers."""

from __future__ import annotations

import collections
import os
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from benchmarks.common import EDGEOPT, cli, interval_of, only, worker_processes
from edgeopt.config.assemble import Request
from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import Measurement, TrialResult, Verdict
from edgeopt.search.storage.trial import ENDED_STATES, Trial
from edgeopt.search.storage.trial_storage import TrialStorage, list_studies
from edgeopt.search.workers import loop
from edgeopt.search.workers.subprocess_evaluator import SubprocessEvaluator
from edgeopt.search.workers.tracking_outbox import TrackingOutbox
from edgeopt.studies.open_study import OpenStudy

if TYPE_CHECKING:
    from support.postgresql import Postgres

SPACE = {
    "step.quantize.block_size": {"choices": [32, 64, 128]},
    "step.prune.ratio": {"low": 0.1, "high": 0.5},
    "step.prune.windows": {"low": 1, "high": 64},
}
METRICS = {"quality/perplexity": "", "latency/decode_p50_ms": "ms", "size/engine_mib": "MiB"}
OTHER_METRICS = [f"metric/{n}" for n in range(30)]
"""Metrics in addition to the objectives, as many as a real trial has."""


def evaluate_instantly(params: Mapping[str, Any], progress: Callable[[str], None]) -> TrialResult:
    """Return a result at once, with random metrics that depend only on the parameters."""
    rng = random.Random(str(sorted(params.items())))
    values = {metric: rng.random() for metric in (*METRICS, *OTHER_METRICS)}
    measurements = tuple(
        Measurement(metric=m, unit=METRICS.get(m, ""), value=v, low=v, high=v, count=1, method="invented")
        for m, v in values.items()
    )
    size = values["size/engine_mib"]
    verdict = Verdict(
        metric="size/engine_mib",
        limit="at most 0.5 MiB",
        bound=0.5,
        value=size,
        excess=size / 0.5 - 1,
        satisfied=size <= 0.5,
        reason="" if size <= 0.5 else "above",
    )
    return TrialResult(
        recipe={"text": "nothing", "digest": "0" * 64},
        target="bench",
        device={"name": "bench"},
        emulated=False,
        measurements=measurements,
        verdicts=(verdict,),
        timings_s={"measure": 0.001},
    )


class SilentWatcher:
    """Watcher that ignores all events of a worker."""

    def started(self, trial: Trial) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, trial: Trial, result: TrialResult) -> None: ...

    def message(self, line: str) -> None: ...


def create_study(folder: Path, store: str | None, *, tracking_uri: str = "", **search: Any) -> OpenStudy:
    """Create a study that logs to a new MLflow store in `folder`, or to `tracking_uri`."""
    uri = tracking_uri or f"sqlite:///{folder}/mlflow.db"
    request = Request(
        name="reference",
        overrides=(
            "recipe=prune_int4",
            "measure.stop_early=false",  # no predictions
            f"state='{folder}'",
            f"tracking.tracking_uri='{uri}'",
            "limits={size: {engine_mib: 0.5 MiB}}",
        ),
    )
    config = request.compose()
    config["search"] |= {"parameters": SPACE, "enqueue": [], "study": f"empty-{random.randrange(10**9)}", **search}
    opened = OpenStudy.from_config(request, config, store=store)
    opened.recorder.connect()
    opened.recorder.open_study(opened.name, config, {})
    opened.open()
    return opened


def run_worker(opened: OpenStudy, evaluator: SubprocessEvaluator) -> None:
    """Run one worker until the study ends."""
    blank = evaluate_instantly({}, print)
    loop.run_worker(
        loop.WorkerContext(
            study=opened.study,
            evaluator=evaluator,
            log=opened.log(),
            watcher=SilentWatcher(),
            empty_result=lambda _: replace(blank, measurements=(), verdicts=()),
        )
    )


def machinery(folder: Path) -> None:
    """Time per trial outside its evaluation: sampling, storing and logging 100 trials that are evaluated instantly.

    The baseline is MLflow's own client, which logs the same params, metrics and tags to the same store.
    """
    from support.postgresql import server

    with server() as postgresql, closing(SubprocessEvaluator(evaluate_instantly, timeout_s=60)) as evaluator:
        for name, store in (("SQLite", None), ("PostgreSQL", postgresql.database())):
            opened = create_study(folder / name, store, trials=10)
            run_worker(opened, evaluator)
            opened.study.search = replace(opened.study.search, trials=110)
            start = time.perf_counter()
            run_worker(opened, evaluator)
            trial_ms = 1e3 * (time.perf_counter() - start) / 100
            print(f"{name}: {trial_ms:.0f} ms per trial; MLflow alone {_mlflow_ms(opened):.0f} ms", flush=True)
    print()


def _mlflow_ms(opened: OpenStudy) -> float:
    """Return the median time in which MLflow's client logs a run with the content of a trial."""
    client, times_s = MlflowClient(tracking_uri=opened.recorder.uri), []
    run = client.get_run(opened.recorder.runs(opened.name)[0])
    metrics = [Metric(name, value, 0, 0) for name, value in run.data.metrics.items()]
    params = [Param(name, value) for name, value in run.data.params.items()]
    for _ in range(30):
        start = time.perf_counter()
        run_id = client.create_run(run.info.experiment_id, tags=run.data.tags).info.run_id
        client.log_batch(run_id, metrics=metrics, params=params)
        client.set_terminated(run_id)
        times_s.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times_s)


def add_finished_trials(opened: OpenStudy, count: int) -> None:
    """Add `count` finished trials to a study without logging them to MLflow."""
    study, rng = opened.study, random.Random(0)
    space = study.search.space
    while len(study._trials) < count:
        params = space.sample(rng)
        trial = study.storage.add(params, origin="sampled", worker="bench", state="running")
        if trial is not None:
            study.finish(trial, evaluate_instantly(params, print))
            study.storage.mark_recorded(trial, run_id="0" * 32)
            study._trials[trial.number] = trial


def ten_thousand(folder: Path) -> None:
    """Time of the next trial and of `edgeopt front`, and memory, in a study of 10,000 finished trials."""
    opened = create_study(folder, None, trials=10_000 + 20)
    start = time.perf_counter()
    add_finished_trials(opened, 10_000)
    print(f"10,000 trials stored in {time.perf_counter() - start:.0f} s")
    reopened = reopen(opened)
    outbox = TrackingOutbox(reopened.study, reopened.log(), print)
    times_s = []
    for _ in range(10):
        start = time.perf_counter()
        trial = reopened.study.ask()
        assert trial is not None
        outbox.begin(trial)
        reopened.study.finish(trial, evaluate_instantly(trial.params, print))
        outbox.flush()
        times_s.append(time.perf_counter() - start)
    print(
        f"sampling, storing and logging: {times_s[0]:.2f} s for the first trial, then "
        f"{statistics.median(times_s[1:]):.2f} s per trial"
    )
    start = time.perf_counter()
    reopened.snapshot_with_champion()
    print(f"front: {time.perf_counter() - start:.2f} s")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB\n")


def reopen(opened: OpenStudy) -> OpenStudy:
    """Return the study as another process would open it."""
    study = replace(opened.study)
    study.worker = "later"
    return replace(opened, study=study)


def kills(folder: Path) -> None:
    """Robustness of four workers on PostgreSQL against 30 random kill -9 and one restart of the database."""
    from support.postgresql import server

    # One thread per worker: latency then does not depend on where the host places the virtual cores.
    measured = [*only("memory", "latency"), "target.threads=1"]
    with server() as postgresql:
        store = postgresql.database()
        environment = {**os.environ, "EDGEOPT_STORE": store}
        command = [EDGEOPT, "sweep", "workers=4", "search.study=kills", "search.trials=24", "promote=null"]
        command += ["limits.size.engine_mib=null", "limits.quality.perplexity_ratio=null", *measured]
        command += ["search.objectives={quality/perplexity: null}", "search.lease_s=20", "--json"]
        with (folder / "front.json").open("wb") as out, (folder / "sweep.log").open("wb") as log:
            sweep = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=log)
        storage = wait_for_storage(store, sweep)
        killed = _kill_workers(sweep, storage, postgresql)
        trials = storage.trials_since(0)
        states = collections.Counter(trial.state for trial in trials)
        lost = sum(trial.attempt - 1 for trial in trials)
        print(f"{killed} workers killed: exit {sweep.returncode}, trials {dict(states)}, lost attempts: {lost}")
        assert all(trial.state != "running" and (trial.state not in ENDED_STATES or trial.recorded) for trial in trials)
        _print_runs(folder)
        agreeing = [_latency_agrees(folder, storage, trial, measured) for trial in trials if trial.state == "finished"]
    print(f"{sum(agreeing)} of {len(agreeing)} decode latencies agree with measurements on the idle machine\n")


def _kill_workers(sweep: subprocess.Popen[bytes], storage: TrialStorage, postgresql: Postgres) -> int:
    """Kill up to 30 random workers until the sweep ends, restart the database once, and return the number of kills.

    Raises:
        AssertionError: a finished trial was lost or changed.
    """
    rng = random.Random(int(time.time()))
    killed, restarted, finished = 0, False, dict[int, Any]()
    while sweep.poll() is None:
        time.sleep(rng.uniform(2, 8))
        if killed == 15 and not restarted:
            print("restarting the database", flush=True)
            postgresql.stop()
            time.sleep(5)
            postgresql.start()
            restarted = True
        workers = worker_processes(sweep.pid)
        if killed < 30 and workers:
            now_finished = {t.number: t.summary for t in storage.trials_since(0) if t.state in ENDED_STATES}
            assert finished.items() <= now_finished.items(), "a finished trial was lost or changed"
            finished = now_finished
            rng.choice(workers).kill()
            killed += 1
    return killed


def _print_runs(folder: Path) -> None:
    """Print the states of the MLflow runs, and how many trials or attempts were logged twice."""
    runs = trial_runs(folder)
    status = collections.Counter(run.info.status for run in runs)
    ended = collections.Counter(run.data.tags[tags.TRIAL] for run in runs if run.info.status == "FINISHED")
    attempts = collections.Counter((run.data.tags[tags.TRIAL], run.data.tags[tags.ATTEMPT]) for run in runs)
    twice = sum(1 for count in [*ended.values(), *attempts.values()] if count > 1)
    print(f"runs in MLflow: {dict(status)}; logged twice: {twice}")


def _latency_agrees(folder: Path, storage: TrialStorage, trial: Trial, overrides: Sequence[str]) -> bool:
    """Measure the engine of a trial again and return whether both intervals of the decode latency overlap."""
    result = storage.load_result(trial.number)
    remeasured = cli(folder, "bench", "--engine", result["engine"]["directory"], *overrides)
    low, high = interval_of({"measurements": result["measurements"]}, "latency/decode_p50_ms")
    second_low, second_high = interval_of(remeasured, "latency/decode_p50_ms")
    return low <= second_high and second_low <= high


def wait_for_storage(url: str, sweep: subprocess.Popen[bytes]) -> TrialStorage:
    """Return the trial storage of the study `kills` once the sweep has created it."""
    while "kills" not in list_studies(url):
        assert sweep.poll() is None, "the sweep ended before it created the study"
        time.sleep(0.5)
    return TrialStorage(url, "kills")


def trial_runs(folder: Path) -> list[Any]:
    """Return the MLflow runs of all trials."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return [run for run in client.search_runs(experiments, max_results=1000) if tags.TRIAL in run.data.tags]
