"""`edgeopt promote`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import GateError

SUMMARY = "Register the front's members by a policy"
EXAMPLE = "edgeopt promote reference"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    registered.policy(parser)
    parser.add_argument("--dry-run", action="store_true", help="judge every gate and change nothing")
    registered.reason(parser, required=False)
    registered.private_key(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.studies.open_study import OpenStudy

    study = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER)
    policy = study.policy(args.policy, args.config_dir)
    study.recorder.connect()
    document = study.promote(
        study.snapshot(), policy, args.config_dir, reason=args.reason, private_key=args.key, dry_run=args.dry_run
    ).to_json()
    refused = sum(1 for release in document["releases"] if not all(gate["passed"] for gate in release["gates"]))
    error = GateError(f"{refused} of {len(document['releases'])} would be refused") if refused else None
    return Outcome(document=document, error=error)


def show(document: Document) -> None:
    from edgeopt.cli import display

    for release in document["releases"]:
        if document["dry_run"]:
            told = f"would be {document['model']} version {release['version'] or 'new'}"
            names = [f"{alias}, {_before(document, alias)}" for alias in release["aliases"]]
        else:
            told = f"is {document['model']} version {release['version']}" + (
                "" if release["created"] else ", as before"
            )
            names = release["aliases"]
        display.out.print(f"trial {release['number']} {told}" + "".join(f", alias {name}" for name in names))
        if document["dry_run"]:
            display.gates(release["gates"])


def _before(document: Document, alias: str) -> str:
    if alias not in document["moved"]:
        return "which points there already"
    return f"which points at {document['moved'][alias] or 'nothing'} now"
