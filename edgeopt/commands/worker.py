"""`edgeopt worker`, and the workers that `edgeopt sweep` starts."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.commands import arguments as shared
from edgeopt.commands.outcome import Document, Outcome
from edgeopt.errors import EdgeoptError

if TYPE_CHECKING:
    from edgeopt.commands.studies import OpenStudy

SUMMARY = "Join a study as one of its workers"
EXAMPLE = "edgeopt worker reference --store postgresql://me@db/studies --state /shared/edgeopt"
ROLES = ("all", "build", "measure")
POLL_S = 1.0


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument("--role", choices=ROLES, default="all", help="build engines, measure them, or both (default)")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this process")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt import assembly
    from edgeopt.commands.studies import OpenStudy
    from edgeopt.measure.process import die_with

    if args.parent is not None:
        die_with(args.parent)
    assembly.quiet()
    opened = OpenStudy.find(args.study, args.state, args.store)
    first = (
        dict(opened.study.search.enqueue[0]) if opened.study.search.enqueue else opened.study.search.space.examples()[0]
    )
    assembly.checked(opened.request.compose(first), opened.request.config_dir)  # a host that lacks the model says so
    opened.recorder.connect()
    work(opened, role=args.role)
    if not opened.study.ledger.members():
        opened.close("FINISHED")
    mine = [row.number for row in opened.study.rows() if row.worker == opened.study.worker]
    return Outcome(document={"study": opened.name, "worker": opened.study.worker, "role": args.role, "trials": mine})


def show(document: Document) -> None:
    from edgeopt import display

    display.out.print(f"{document['worker']} worked on {len(document['trials'])} trials of {document['study']}")


def work(opened: OpenStudy, *, role: str = "all") -> None:
    """Be a worker of the study in this process until it is over."""
    from edgeopt import assembly, display
    from edgeopt.commands.studies import StudyLog
    from edgeopt.search import loop
    from edgeopt.search.evaluator import Evaluator

    study, request = opened.study, opened.request
    study.built = {"build": False, "measure": True}.get(role)
    evaluate = partial(assembly.evaluate_trial, request)
    with display.sweep(study) as watcher:
        loop.run(
            loop.Sweep(
                study=study,
                evaluator=Evaluator(evaluate, timeout_s=study.search.trial_timeout_s),
                log=StudyLog(recorder=opened.recorder, study=opened.name, request=request),
                watcher=watcher,
                blank=partial(assembly.blank, request),
                role=role,
            )
        )


def team(opened: OpenStudy, count: int) -> None:
    """Have `count` processes work on the study until it is over; one that is killed is replaced.

    Raises EdgeoptError where all of them ended with an error, with the words of one.
    """
    from edgeopt import display

    logs = Path(opened.config["state"]) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    workers = {n: _start(opened, logs / f"{opened.name}-{n}.log", count) for n in range(count)}
    try:
        with display.team(opened.study) as refresh:
            while workers:
                time.sleep(POLL_S)
                refresh()
                for number, process in list(workers.items()):
                    code = process.poll()
                    if code is not None and code < 0 and not opened.study.settled():
                        workers[number] = _start(opened, logs / f"{opened.name}-{number}.log", count)
                    elif code is not None:
                        del workers[number]
        if not opened.study.settled():
            raise EdgeoptError("every worker ended with an error", place=str(logs), mend="Read what they said there")
    finally:
        for process in workers.values():
            process.send_signal(signal.SIGINT)
        for process in workers.values():
            process.wait()


def _start(opened: OpenStudy, log: Path, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeopt.cli", "worker", opened.name, "--state", str(opened.config["state"])]
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "EDGEOPT_STORE": opened.study.ledger.url}
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )  # a session of its own: Ctrl-C reaches the parent alone, which tells them
