"""Implement `edgeopt build-plan`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import InputError

SUMMARY = "Build a TensorRT engine from a build plan, on its device"
EXAMPLE = "edgeopt build-plan plan/ --out engine/"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="DIR", help="engine folder that holds a plan")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: DIR-engine)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble, trial_process
    from edgeopt.runtimes.tensorrt.build_from_plan import build_from_plan

    trial_process.silence_libraries()
    out = args.out or args.plan.resolve().with_name(f"{args.plan.resolve().name}-engine")
    if out.exists() and any(out.iterdir()):
        raise InputError("the output folder must be empty", location=str(out), hint="Give another --out")
    plan, _ = assemble.open_engine(args.plan)
    with display.progress("building") as progress:
        engine = build_from_plan(plan, out, progress)
    return Outcome(document=asdict(engine.summary()))


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.out.print(f"built: {document['directory']}, {document['size_bytes'] / 2**20:.1f} MiB")
