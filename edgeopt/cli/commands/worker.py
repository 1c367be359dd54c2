"""Implement `edgeopt worker`."""

from __future__ import annotations

import argparse
from contextlib import closing

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Join a study as one of its workers"
EXAMPLE = "edgeopt worker reference --store postgresql://me@db/studies --state /shared/edgeopt"
ROLES = ("all", "build", "measure")


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument(
        "--role", choices=ROLES, default="all", help="build engines, measure engines, or do both (default: all)"
    )
    parser.add_argument("--parent", type=int, metavar="PID", help="stop when this process ends")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble, trial_process
    from edgeopt.machine.procfs import exit_with_parent
    from edgeopt.studies.open_study import OpenStudy
    from edgeopt.studies.work import start_evaluator, work

    if args.parent is not None:
        exit_with_parent(args.parent)
    trial_process.silence_libraries()
    opened = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER)
    search = opened.study.search
    with closing(start_evaluator(opened.request, search, role=args.role)) as evaluator:
        first = dict(search.enqueue[0]) if search.enqueue else search.space.examples()[0]
        config = opened.request.compose(first)
        assemble.build_checked_job(config, opened.request.config_dir)  # this machine may lack the model
        opened.recorder.connect()
        work(opened, evaluator, role=args.role)
    if not opened.study.storage.active_workers():
        opened.close("FINISHED")
    worker = opened.study.worker
    trials = [trial.number for trial in opened.study.trials() if trial.worker == worker]
    return Outcome(document={"study": opened.name, "worker": worker, "role": args.role, "trials": trials})


def show(document: Document) -> None:
    from edgeopt.cli import display

    trials = display.count(len(document["trials"]), "trial")
    display.out.print(f"worker {document['worker']}: {trials} of {document['study']}")
