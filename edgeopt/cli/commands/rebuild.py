"""Implement `edgeopt rebuild`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import BuildError

if TYPE_CHECKING:
    from edgeopt.studies.rebuild import Rebuilt

SUMMARY = "Build the engine of a logged run again, from the config that the run stores"
EXAMPLE = "edgeopt rebuild 3f6c1d9e0b7a4c52"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="id of the MLflow run of a trial")
    parser.add_argument("--state", type=Path, default=Path(".edgeopt"), help="folder of the cache (default: .edgeopt)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.studies.rebuild import rebuild

    with display.progress("rebuilding") as progress:
        rebuilt = rebuild(args.run, state=args.state, config_dir=args.config_dir, progress=progress)
    return Outcome(document=rebuilt.to_json(), error=None if rebuilt.same else _digest_error(rebuilt))


def _digest_error(rebuilt: Rebuilt) -> BuildError:
    """Return the error for an engine with another digest. Its hint names the likely cause."""
    changed = ", ".join(f"{name} {before} (now {now})" for name, (before, now) in rebuilt.changed_versions.items())
    return BuildError(
        f"the rebuilt engine differs from the measured one: digest {rebuilt.engine.digest[:12]}, "
        f"expected {rebuilt.expected_digest[:12]}",
        location=str(rebuilt.engine.directory),
        hint=f"Install the versions that built it: {changed}" if changed else "Build it on the same kind of processor",
    )


def show(document: Document) -> None:
    from edgeopt.cli import display

    comparison = "identical to the measured engine" if document["same"] else "differs from the measured engine"
    display.out.print(f"{document['engine']['directory']}: {comparison}")
