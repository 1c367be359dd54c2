"""`edgeopt worker`."""

from __future__ import annotations

import argparse
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request
    from edgeopt.search.space.definition import Search
    from edgeopt.search.workers.subprocess_evaluator import Evaluator
    from edgeopt.studies.open_study import OpenStudy

SUMMARY = "Join a study as one of its workers"
EXAMPLE = "edgeopt worker reference --store postgresql://me@db/studies --state /shared/edgeopt"
ROLES = ("all", "build", "measure")


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument("--role", choices=ROLES, default="all", help="build engines, measure them, or both (default)")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this process")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.config import assemble
    from edgeopt.machine.procfs import die_with
    from edgeopt.studies.open_study import OpenStudy

    if args.parent is not None:
        die_with(args.parent)
    assemble.quiet()
    opened = OpenStudy.find(args.study, args.state, args.store)
    search = opened.study.search
    with closing(evaluator(opened.request, search, role=args.role)) as starting:
        first = dict(search.enqueue[0]) if search.enqueue else search.space.examples()[0]
        assemble.checked(opened.request.compose(first), opened.request.config_dir)  # a host may lack the model
        opened.recorder.connect()
        work(opened, starting, role=args.role)
    if not opened.study.ledger.members():
        opened.close("FINISHED")
    mine = [row.number for row in opened.study.rows() if row.worker == opened.study.worker]
    return Outcome(document={"study": opened.name, "worker": opened.study.worker, "role": args.role, "trials": mine})


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.out.print(f"{document['worker']} worked on {len(document['trials'])} trials of {document['study']}")


def evaluator(request: Request, search: Search, *, role: str = "all") -> Evaluator:
    """The process that evaluates a search's trials, which has begun to start."""
    from edgeopt.config import assemble
    from edgeopt.search.workers.subprocess_evaluator import Evaluator

    evaluate = partial(assemble.evaluate_trial, request, build_only=role == "build")
    made = Evaluator(evaluate, timeout_s=search.trial_timeout_s, prepare=assemble.prepare)
    made.start()
    return made


def work(opened: OpenStudy, evaluator: Evaluator, *, role: str = "all") -> None:
    """Be a worker of the study in this process until it is over."""
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.search.workers import loop

    study, request = opened.study, opened.request
    study.built = {"build": False, "measure": True}.get(role)
    with display.sweep(study) as watcher:
        loop.run(
            loop.Sweep(
                study=study,
                evaluator=evaluator,
                log=opened.log(),
                watcher=watcher,
                blank=partial(assemble.blank, request),
                role=role,
                patience_s=opened.recorder.patience_s,
            )
        )
