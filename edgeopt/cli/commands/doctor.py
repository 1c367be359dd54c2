"""Implement `edgeopt doctor`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Check what this machine can build, run and measure"
EXAMPLE = "edgeopt doctor"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments of its own."""


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli.doctor_checks import diagnose

    return Outcome(document={"checks": [asdict(check) for check in diagnose()]})


def show(document: Document) -> None:
    from rich.table import Table
    from rich.text import Text

    from edgeopt.cli import display

    table = Table(title="what this machine can do")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in document["checks"]:
        good = Text("yes", style="green") if check["good"] else Text("no", style="yellow")
        table.add_row(good, check["what"], check["found"], "" if check["good"] else check["hint"])
    display.out.print(table)
