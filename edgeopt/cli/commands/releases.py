"""`edgeopt releases`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Show a registered model's versions and its ledger"
EXAMPLE = "edgeopt releases edgeopt"
BRIEF = True
SHOWN = 20
"""The latest entries of the ledger that are printed; --json gives all."""


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.model(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.release.overview import overview

    return Outcome(document=overview(args.model, tracking_uri=args.tracking_uri))


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display

    table = Table(title=f"{document['model']}: {len(document['versions'])} versions")
    for column in ("version", "aliases", "trial", "recipe", "engine", "registered by", "approved by", "signed"):
        table.add_column(column, overflow="fold")
    for version in document["versions"]:
        table.add_row(
            version["version"],
            ", ".join(version["aliases"]),
            version["trial"],
            version["recipe"],
            f"{version['digest'][:12]}…",
            version["registered_by"],
            ", ".join(version["approved_by"]),
            "yes" if version["signed"] else "no",
        )
    display.out.print(table)
    for entry in document["ledger"][-SHOWN:]:
        display.out.print(f"{entry['place']:>4}  {entry['at'][:19]}  {entry['actor']} {entry['told']}")
