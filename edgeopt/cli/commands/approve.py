"""Implement `edgeopt approve`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Approve a registered version, or revoke an approval"
EXAMPLE = 'edgeopt approve edgeopt/3 --reason "ran a week on the test bench"'


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser)
    registered.reason(parser, required=True)
    parser.add_argument("--revoke", action="store_true", help="take your own approval back")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.release.approve import approve, revoke

    reference = registered.reference(args)
    act, title = (revoke, "revoking the approval") if args.revoke else (approve, "approving")
    with display.progress(title) as progress:
        done = act(reference, args.reason, tracking_uri=args.tracking_uri, progress=progress)
    return Outcome(document={**asdict(done), "revoked": args.revoke})


def show(document: Document) -> None:
    from edgeopt.cli import display

    name = f"{document['model']} version {document['version']}, engine {document['digest'][:12]}…"
    words = "approval revoked by" if document["revoked"] else "approved by"
    again = "" if document["changed"] else " (already in the ledger)"
    display.out.print(f"{name}: {words} {document['actor']}{again}")
