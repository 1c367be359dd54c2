"""Implement `edgeopt bench`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Measure an engine folder or a registered model"
EXAMPLE = "edgeopt bench --engine edgeopt@champion"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    parser.add_argument("--engine", required=True, help="engine folder, NAME@ALIAS or models:/NAME/VERSION")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.studies.engine import verified_engine

    bench = assemble.build_bench(shared.request(args).compose())
    with verified_engine(args.engine) as (engine, _), display.progress("measuring") as progress:
        measurements = bench.measure_engine(engine, progress)
    return Outcome(
        document={
            "engine": str(engine.directory),
            "digest": engine.digest,
            "device": asdict(bench.device),
            "measurements": [asdict(m) for m in measurements],
        }
    )


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.measurements(document["measurements"])
