"""`edgeopt approve`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Approve a registered version"
EXAMPLE = 'edgeopt approve edgeopt/3 --reason "ran a week on the test bench"'


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser)
    registered.reason(parser, required=True)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.release.approve import approve

    with display.progress("approving") as progress:
        done = approve(registered.reference(args), args.reason, tracking_uri=args.tracking_uri, progress=progress)
    return Outcome(document=asdict(done))


def show(document: Document) -> None:
    from edgeopt.cli import display

    told = f"{document['model']} version {document['version']} is approved by {document['actor']}"
    display.out.print(f"{told}, engine {document['digest'][:12]}…")
