"""`edgeopt worker`."""

from __future__ import annotations

import argparse
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from edgeopt.commands import arguments as shared
from edgeopt.commands.outcome import Document, Outcome

if TYPE_CHECKING:
    from edgeopt.assembly import Request
    from edgeopt.commands.studies import OpenStudy
    from edgeopt.search.definition import Search
    from edgeopt.search.evaluator import Evaluator

SUMMARY = "Join a study as one of its workers"
EXAMPLE = "edgeopt worker reference --store postgresql://me@db/studies --state /shared/edgeopt"
ROLES = ("all", "build", "measure")


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
    search = opened.study.search
    with closing(evaluator(opened.request, search, role=args.role)) as starting:
        first = dict(search.enqueue[0]) if search.enqueue else search.space.examples()[0]
        assembly.checked(opened.request.compose(first), opened.request.config_dir)  # a host may lack the model
        opened.recorder.connect()
        work(opened, starting, role=args.role)
    if not opened.study.ledger.members():
        opened.close("FINISHED")
    mine = [row.number for row in opened.study.rows() if row.worker == opened.study.worker]
    return Outcome(document={"study": opened.name, "worker": opened.study.worker, "role": args.role, "trials": mine})


def show(document: Document) -> None:
    from edgeopt import display

    display.out.print(f"{document['worker']} worked on {len(document['trials'])} trials of {document['study']}")


def evaluator(request: Request, search: Search, *, role: str = "all") -> Evaluator:
    """The process that evaluates a search's trials, which has begun to start."""
    from edgeopt import assembly
    from edgeopt.search.evaluator import Evaluator

    evaluate = partial(assembly.evaluate_trial, request, build_only=role == "build")
    made = Evaluator(evaluate, timeout_s=search.trial_timeout_s, prepare=assembly.prepare)
    made.start()
    return made


def work(opened: OpenStudy, evaluator: Evaluator, *, role: str = "all") -> None:
    """Be a worker of the study in this process until it is over."""
    from edgeopt import assembly, display
    from edgeopt.search import loop

    study, request = opened.study, opened.request
    study.built = {"build": False, "measure": True}.get(role)
    with display.sweep(study) as watcher:
        loop.run(
            loop.Sweep(
                study=study,
                evaluator=evaluator,
                log=opened.log(),
                watcher=watcher,
                blank=partial(assembly.blank, request),
                role=role,
                patience_s=opened.recorder.patience_s,
            )
        )
