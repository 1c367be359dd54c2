"""Several workers on one study, started and replaced from one command: processes here, or tasks of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.errors import ConfigError, EdgeoptError

if TYPE_CHECKING:
    from edgeopt.studies.open_study import OpenStudy

POLL_S = 1.0
RESOURCE = "edgeopt:{}"
"""The custom resource of nodes on which a target's engines are measured, by the target's name."""


def processes(opened: OpenStudy, count: int, refresh: Callable[[], None]) -> None:
    """Have `count` processes of this machine work on the study until it is over; one that is killed is replaced.

    Raises EdgeoptError where all of them ended with an error.
    """
    logs = Path(opened.config["state"]) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = {n: _process(opened, logs / f"{opened.name}-{n}.log", count) for n in range(count)}
    done = False
    try:
        while started:
            time.sleep(POLL_S)
            refresh()
            for number, process in list(started.items()):
                code = process.poll()
                if code is None:
                    continue
                done = done or code == 0  # a worker that ends by itself leaves nothing to do
                if code < 0 and not done:
                    started[number] = _process(opened, logs / f"{opened.name}-{number}.log", count)
                else:
                    del started[number]
        if not done:
            raise EdgeoptError("every worker ended with an error", location=str(logs), hint="Read what they said there")
    finally:
        for process in started.values():
            process.send_signal(signal.SIGINT)
        for process in started.values():
            process.wait()


def _process(opened: OpenStudy, log: Path, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeopt.cli", "worker", opened.name, "--state", str(opened.config["state"])]
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "EDGEOPT_STORE": opened.study.storage.url}
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )  # a session of its own: Ctrl-C reaches the parent alone, which tells them


def on_ray(opened: OpenStudy, count: int, refresh: Callable[[], None]) -> None:
    """Have a Ray cluster work on the study: `count` tasks build on any node, and one measures on each of the device's.

    Nodes that measure carry the custom resource RESOURCE, each as often as devices are attached to it. A task whose
    node dies is started again where there is room; its trial is queued again meanwhile. Ray is joined by RAY_ADDRESS,
    or started here.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", location="search.engine", hint="pip install 'edgeopt[ray]'"
        ) from error
    resource = RESOURCE.format(opened.config["target"]["name"])
    ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    devices = int(ray.cluster_resources().get(resource, 0))
    if not devices:
        raise ConfigError(
            f"no node of the cluster carries the resource {resource!r}",
            location="search.engine",
            hint=f"Start those that measure by ray start --resources '{{\"{resource}\": 1}}'",
        )
    task = ray.remote(max_retries=0)(_task)
    known = (opened.name, str(Path(opened.config["state"]).absolute()), opened.study.storage.url)

    def begin(role: str) -> Any:
        needs = {"num_cpus": 0, "resources": {resource: 1}} if role == "measure" else {"num_cpus": 1}
        return task.options(**needs).remote(*known, opened.recorder.uri, role)

    running = {begin(role): role for role in ["build"] * count + ["measure"] * devices}
    over = False
    try:
        while running:
            done, _ = ray.wait(list(running), timeout=POLL_S)
            refresh()
            for reference in done:
                role = running.pop(reference)
                try:
                    ray.get(reference)
                    over = True  # a worker that ends by itself leaves nothing to do
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.RayActorError):
                    if not over:
                        running[begin(role)] = role
                except ray.exceptions.RayTaskError as error:
                    raise EdgeoptError(f"a worker of role {role} ended: {error.cause}", location="ray") from error
    finally:
        for reference in running:
            with suppress(ray.exceptions.RayError):
                ray.cancel(reference)
        ray.shutdown()


def _task(study: str, state: str, store: str, tracking_uri: str, role: str) -> None:
    """A worker inside a task of Ray."""
    from edgeopt.studies.open_study import OpenStudy
    from edgeopt.studies.work import start_evaluator, work

    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    opened = OpenStudy.find(study, Path(state), store)
    with closing(start_evaluator(opened.request, opened.study.search, role=role)) as evaluator:
        work(opened, evaluator, role=role)


def run(opened: OpenStudy, count: int) -> None:
    """Have `count` workers work on the study until it is over, on the engine that the search names."""
    engine = on_ray if opened.study.search.engine == "ray" else processes
    with opened.reporter.workers(opened.study) as refresh:
        engine(opened, count, refresh)
