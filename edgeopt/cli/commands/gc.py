"""Implement `edgeopt gc`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Remove engines that are not on the front from the artifact store"
EXAMPLE = "edgeopt gc reference --dry-run"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed and change nothing")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import trial_process
    from edgeopt.studies.open_study import OpenStudy

    trial_process.silence_libraries()
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
        shared_with = "" if one["freed_bytes"] else " (its files are shared with other engines)"
        mib = one["freed_bytes"] / 2**20
        display.out.print(f"trial {one['trial']}: {mib:.2f} MiB{shared_with} (edgeopt rebuild {one['run_id']})")
    verb = "would free" if document["dry_run"] else "freed"
    display.out.print(f"{verb} {document['freed_bytes'] / 2**20:.2f} MiB; registered engines stay")
