"""Implement `edgeopt status`."""

from __future__ import annotations

import argparse
import json
import time

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Show the progress of a study: workers, trials, time spent and saved"
EXAMPLE = "edgeopt status --watch"
EVERY_S = 2.0


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument("--watch", action="store_true", help="refresh every two seconds until the study is over")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.search.status import collect_status
    from edgeopt.studies.open_study import OpenStudy

    study = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER).study
    while True:
        document = {**collect_status(study).to_json(), "hypervolumes": study.hypervolume_history()}
        if not args.watch or (study.is_complete() and not document["workers"]):
            return Outcome(document=document)
        if args.json:
            print(json.dumps(document), flush=True)
        else:
            from edgeopt.cli import display

            display.out.clear()
            show(document)
        time.sleep(EVERY_S)


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.status(document)
