"""Implement `edgeopt verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import GateError

SUMMARY = "Check the files, signature and ledger of a registered version, or a pulled copy of it"
EXAMPLE = "edgeopt verify edgeopt@champion"
BRIEF = True


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser)
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="check this pulled copy instead of the registry's files"
    )
    registered.public_key(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.release.verify import verify

    verification = verify(
        registered.reference(args), public_key=args.public_key, folder=args.folder, tracking_uri=args.tracking_uri
    )
    try:
        verification.require()
    except GateError as error:
        return Outcome(document=verification.to_json(), error=error)
    return Outcome(document=verification.to_json())


def show(document: Document) -> None:
    from edgeopt.cli import display

    engine = f"engine {document['digest'][:12]}…" if document["digest"] else "no valid engine"
    display.out.print(f"{document['model']} version {document['version']}, {engine}")
    display.gates(document["checks"])
