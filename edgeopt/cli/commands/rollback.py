"""Implement `edgeopt rollback`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Point an alias back at an earlier version"
EXAMPLE = 'edgeopt rollback edgeopt@champion --reason "crashes on boards with 1 GiB"'


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser, "NAME@ALIAS")
    registered.reason(parser, required=True)
    parser.add_argument(
        "--to", metavar="N", help="earlier version of the alias (default: the one before the current version)"
    )
    parser.add_argument(
        "--policy", metavar="NAME", help="release policy in registry/ (default: the policy of the model, if any)"
    )


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.studies.releases import roll_back

    with display.progress("rolling back") as progress:
        rollback = roll_back(
            args.version,
            args.reason,
            to=args.to,
            policy=args.policy,
            tracking_uri=args.tracking_uri,
            config_dir=args.config_dir,
            progress=progress,
        )
    return Outcome(document=asdict(rollback))


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.out.print(
        f"{document['model']}@{document['alias']}: version {document['after']} (was version {document['before']})"
    )
