"""Start several workers on one study and replace those that die: local processes, or tasks of a Ray cluster."""

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
"""Ray custom resource of the nodes that measure engines; formatted with the target name."""


def run_local(opened: OpenStudy, count: int, refresh: Callable[[], None]) -> None:
    """Run `count` worker processes on this machine until the study is over, and replace killed workers.

    Raises EdgeoptError if every worker ends with an error.
    """
    logs = Path(opened.config["state"]) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = {n: _start_process(opened, logs / f"{opened.name}-{n}.log", count) for n in range(count)}
    done = False
    try:
        while started:
            time.sleep(POLL_S)
            refresh()
            for number, process in list(started.items()):
                code = process.poll()
                if code is None:
                    continue
                done = done or code == 0  # a worker exits with success only when no trial is left
                if code < 0 and not done:
                    started[number] = _start_process(opened, logs / f"{opened.name}-{number}.log", count)
                else:
                    del started[number]
        if not done:
            raise EdgeoptError(
                "every worker ended with an error", location=str(logs), hint="Read the logs in this folder"
            )
    finally:
        for process in started.values():
            process.send_signal(signal.SIGINT)
        for process in started.values():
            process.wait()


def _start_process(opened: OpenStudy, log: Path, count: int) -> subprocess.Popen[bytes]:
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
            start_new_session=True,  # Ctrl-C reaches only the parent, which interrupts the workers
        )


def run_on_ray(opened: OpenStudy, count: int, refresh: Callable[[], None]) -> None:
    """Run the study on a Ray cluster: `count` tasks build engines on any node, one task per device measures them.

    A node that measures declares the custom resource `RESOURCE` once per attached device. If a node dies, its tasks
    restart on another node and their trials are queued again. RAY_ADDRESS names the cluster; without it, Ray starts on
    this machine.

    Raises:
        ConfigError: Ray is not installed, or no node declares the resource.
        EdgeoptError: a worker ended with an error.
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
            f"at least one node of the cluster must declare the resource {resource!r}, got none",
            location="search.engine",
            hint=f"Start the nodes that measure with ray start --resources '{{\"{resource}\": 1}}'",
        )
    task = ray.remote(max_retries=0)(_task)
    arguments = (opened.name, str(Path(opened.config["state"]).absolute()), opened.study.storage.url)

    def start(role: str) -> Any:
        options = {"num_cpus": 0, "resources": {resource: 1}} if role == "measure" else {"num_cpus": 1}
        return task.options(**options).remote(*arguments, opened.recorder.uri, role)

    running = {start(role): role for role in ["build"] * count + ["measure"] * devices}
    done = False
    try:
        while running:
            ended, _ = ray.wait(list(running), timeout=POLL_S)
            refresh()
            for reference in ended:
                role = running.pop(reference)
                try:
                    ray.get(reference)
                    done = True  # a worker exits with success only when no trial is left
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.RayActorError):
                    if not done:
                        running[start(role)] = role
                except ray.exceptions.RayTaskError as error:
                    raise EdgeoptError(f"a worker of role {role} failed: {error.cause}", location="ray") from error
    finally:
        for reference in running:
            with suppress(ray.exceptions.RayError):
                ray.cancel(reference)
        ray.shutdown()


def _task(study: str, state: str, store: str, tracking_uri: str, role: str) -> None:
    """Run one worker inside a Ray task."""
    from edgeopt.studies.open_study import OpenStudy
    from edgeopt.studies.work import start_evaluator, work

    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    opened = OpenStudy.find(study, Path(state), store)
    with closing(start_evaluator(opened.request, opened.study.search, role=role)) as evaluator:
        work(opened, evaluator, role=role)


def run(opened: OpenStudy, count: int) -> None:
    """Run `count` workers until the study is over: local processes or Ray tasks, by `search.engine`."""
    launch = run_on_ray if opened.study.search.engine == "ray" else run_local
    with opened.reporter.workers(opened.study) as refresh:
        launch(opened, count, refresh)
