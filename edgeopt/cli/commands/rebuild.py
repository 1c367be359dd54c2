"""`edgeopt rebuild`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import BuildError

SUMMARY = "Build the engine of a logged run again, from the config that the run keeps"
EXAMPLE = "edgeopt rebuild 3f6c1d9e0b7a4c52"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="id of the MLflow run of a trial")
    parser.add_argument("--state", type=Path, default=Path(".edgeopt"), help="folder of the cache (default: .edgeopt)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.pipeline.evaluate import evaluate
    from edgeopt.tracking import logged_config

    assemble.quiet()
    logged = logged_config.logged(args.run)
    # whatever it keeps or breaks, it was built then
    config = {**logged.config, "state": str(args.state), "store": None, "limits": {}}
    store = assemble.store(config)
    with store.protect(), display.progress("rebuilding") as progress:
        result = evaluate(assemble.job(config, args.config_dir), store, progress, build_only=True)
    if result.engine is None:
        failure = result.failure
        raise BuildError(f"{failure.stage}: {failure.message}" if failure else "nothing was built", location=args.run)
    built = dict(result.engine)
    same = built["digest"] == logged.engine_digest
    document: Document = {"run_id": args.run, "engine": built, "wanted": logged.engine_digest, "same": same}
    error = None if same else _other(document, logged.versions, logged_config.versions())
    return Outcome(document=document, error=error)


def _other(document: Document, then: Mapping[str, str], now: Mapping[str, str]) -> BuildError:
    """Why another engine came out, by what is known to decide it."""
    names = [name for name in sorted(then) if then[name] != now.get(name)]
    changed = ", ".join(f"{name} {then[name]} in place of {now.get(name, 'none')}" for name in names)
    return BuildError(
        f"it is another engine than the one that was measured, {document['wanted'][:12]}",
        location=str(document["engine"]["directory"]),
        hint=f"Install what built it: {changed}" if changed else "Build it on the same kind of processor",
    )


def show(document: Document) -> None:
    from edgeopt.cli import display

    told = "the engine that was measured" if document["same"] else "another engine"
    display.out.print(f"{document['engine']['directory']}: {told}")
