"""`edgeopt gc`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Remove engines off a study's front from MLflow's artifact store; registered ones stay"
EXAMPLE = "edgeopt gc reference --dry-run"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument("--dry-run", action="store_true", help="tell what would go and change nothing")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.studies.open_study import OpenStudy

    assemble.quiet()
    opened = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER)
    front = [row.number for row in opened.study.front()]
    released = [asdict(one) for one in opened.recorder.release(opened.name, front, dry_run=args.dry_run)]
    document: Document = {
        "study": opened.name,
        "dry_run": args.dry_run,
        "released": released,
        "freed_bytes": sum(one["freed_bytes"] for one in released),
    }
    return Outcome(document=document)


def show(document: Document) -> None:
    from edgeopt.cli import display

    for one in document["released"]:
        shared_with = "" if one["freed_bytes"] else ", whose files others need"
        mib = one["freed_bytes"] / 2**20
        display.out.print(f"trial {one['trial']}: {mib:.2f} MiB{shared_with} (edgeopt rebuild {one['run_id']})")
    verb = "would be" if document["dry_run"] else "were"
    display.out.print(f"{document['freed_bytes'] / 2**20:.2f} MiB {verb} freed")
