"""Implement `edgeopt copy`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Copy a registered version to another registry"
EXPERIMENT = "edgeopt-copies"
"""Experiment that holds the copied engines in the other store."""
EXAMPLE = "edgeopt copy edgeopt@champion --to https://mlflow.production.example --alias champion"


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser, "NAME@ALIAS")
    parser.add_argument("--to", required=True, metavar="URI", help="tracking URI of the other registry")
    parser.add_argument("--name", default="", help="name of the registered model there (default: the same)")
    parser.add_argument(
        "--alias", action="append", default=[], metavar="ALIAS", help="alias that points at the copy there"
    )
    registered.reason(parser, required=False)
    registered.public_key(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.release.copy import copy
    from edgeopt.tracking import server

    server.probe(args.to)  # MLflow's own client retries for minutes
    with server.connect(args.to) as client:
        experiment = server.get_or_create_experiment(client, args.to, EXPERIMENT)
    with display.progress("copying") as progress:
        done = copy(
            registered.reference(args),
            args.to,
            experiment,
            name=args.name,
            aliases=tuple(args.alias),
            reason=args.reason,
            public_key=args.public_key,
            tracking_uri=args.tracking_uri,
            progress=progress,
        )
    return Outcome(document=asdict(done))


def show(document: Document) -> None:
    from edgeopt.cli import display

    words = "copied to" if document["created"] else "was already copied to"
    display.out.print(f"{document['origin']}: {words} {document['model']} version {document['version']}")
