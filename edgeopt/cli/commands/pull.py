"""Implement `edgeopt pull`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

if TYPE_CHECKING:
    from edgeopt.core.result import Measurement
    from edgeopt.release.pull import PulledEngine

SUMMARY = "Fetch a registered engine and verify it"
EXAMPLE = "edgeopt pull edgeopt@champion engine --bench"


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser, "NAME@ALIAS")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder for the engine")
    parser.add_argument(
        "--bench", action="store_true", help="measure it on this machine and compare with the recorded values"
    )
    registered.public_key(parser)
    shared.overrides(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.release.pull import pull

    pulled = pull(registered.reference(args), args.folder, public_key=args.public_key, tracking_uri=args.tracking_uri)
    measured, warning = _measure(args, pulled) if args.bench else ([], "")
    return Outcome(
        document={
            "engine": str(pulled.engine.directory),
            "digest": pulled.engine.digest,
            "verification": pulled.verification.to_json(),
            "recorded": [asdict(m) for m in pulled.recorded],
            "measured": [asdict(m) for m in measured],
            "warning": warning,
        }
    )


def _measure(args: argparse.Namespace, pulled: PulledEngine) -> tuple[list[Measurement], str]:
    """Return measurements on this machine, and a warning if they are for another text than the recorded ones."""
    from edgeopt.cli import display
    from edgeopt.config import assemble

    bound = assemble.build_bench(shared.request(args).compose())
    engine, _ = assemble.open_engine(pulled.engine.directory)
    with display.progress("measuring") as progress:
        measured = list(bound.measure_engine(engine, progress))
    return measured, pulled.text_warning(bound.evaluation)


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display
    from edgeopt.core import units

    display.gates(document["verification"]["checks"])
    display.out.print(f"engine {document['digest'][:12]}… is in {document['engine']}")
    if not document["measured"]:
        return
    recorded = {m["metric"]: m for m in document["recorded"]}
    table = Table()
    for column in ("metric", "recorded", "measured here", "ratio"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for here in document["measured"]:
        there = recorded.get(here["metric"])
        before = "–" if there is None else units.format_quantity(there["value"], there["unit"])
        is_other_text = here["metric"].startswith("quality/") and bool(document["warning"])
        ratio = "–"
        if there is not None and there["value"] and not is_other_text:
            ratio = f"{here['value'] / there['value']:.2f}"
        table.add_row(here["metric"], before, units.format_quantity(here["value"], here["unit"]), ratio)
    display.out.print(table)
    if document["warning"]:
        display.err.print(f"warning: {document['warning']}", style="yellow")
