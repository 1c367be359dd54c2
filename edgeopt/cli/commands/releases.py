"""Implement `edgeopt releases`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Show the versions and the ledger of a registered model"
EXAMPLE = "edgeopt releases edgeopt"
BRIEF = True
SHOWN = 20
"""Latest ledger entries that are printed; --json prints all."""


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.model(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.release.overview import overview

    return Outcome(document=overview(args.model, tracking_uri=args.tracking_uri).to_json())


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display

    title = f"{document['model']}: {display.count(len(document['versions']), 'version')}"
    table = Table(title=title, padding=(0, 0), pad_edge=False)
    for column in ("version", "aliases", "trial", "recipe", "engine", "registered\nby", "approved\nby", "signed"):
        table.add_column(column, no_wrap=True)
    for version in document["versions"]:
        table.add_row(
            version["version"],
            "\n".join(version["aliases"]),
            version["trial"],
            _one_setting_per_line(version["recipe"]),
            f"{version['digest'][:8]}…",
            version["registered_by"],
            "\n".join(version["approved_by"]),
            "yes" if version["signed"] else "no",
        )
    display.out.print(table)
    for entry in document["ledger"][-SHOWN:]:
        display.out.print(
            f"{entry['place']:>4}  {entry['at'][:19].replace('T', ' ')} UTC  {entry['actor']} {entry['description']}"
        )


def _one_setting_per_line(recipe: str) -> str:
    """Return `a → b` or `a key=value` with one step or setting per line."""
    return recipe.replace(" → ", "\n→\u00a0").replace(" ", "\n")
