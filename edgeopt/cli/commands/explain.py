"""Implement `edgeopt explain`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Say in five lines what a trial gained and lost, and why it is or is not on the front"
EXAMPLE = "edgeopt explain 5"
BRIEF = True


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", type=int, metavar="TRIAL", help="number of the trial")
    shared.study(parser, option=True)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.core.study_summary import explanation
    from edgeopt.errors import InputError
    from edgeopt.studies.open_study import OpenStudy

    snapshot = OpenStudy.find(args.study, args.state, args.store).snapshot_with_champion()
    trial = next((trial for trial in snapshot.trials if trial.number == args.trial), None)
    if trial is None:
        raise InputError(
            f"study {snapshot.study!r} has no trial {args.trial}",
            location="TRIAL",
            hint=f"It has trials 0 to {len(snapshot.trials) - 1}: edgeopt front {snapshot.study}",
        )
    lines = explanation(snapshot, trial)
    return Outcome(document={"study": snapshot.study, "trial": trial.to_json(), "explanation": lines})


def show(document: Document) -> None:
    from edgeopt.cli import display

    for line in document["explanation"]:
        display.out.print(line)
