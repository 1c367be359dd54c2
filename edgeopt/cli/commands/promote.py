"""Implement `edgeopt promote`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import GateError

SUMMARY = "Register the front of a study by a release policy"
EXAMPLE = "edgeopt promote reference --dry-run"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    registered.policy(parser)
    parser.add_argument("--trial", type=int, metavar="N", help="register only this trial of the front")
    parser.add_argument("--dry-run", action="store_true", help="run every gate and change nothing")
    registered.reason(parser, required=False)
    registered.private_key(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.studies.open_study import OpenStudy

    study = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER)
    policy = study.policy(args.policy, args.config_dir)
    study.recorder.connect()
    promotion = study.promote(
        study.snapshot(),
        policy,
        args.config_dir,
        trial=args.trial,
        reason=args.reason,
        private_key=args.key,
        dry_run=args.dry_run,
    )
    refused = [release for release in promotion.releases if not all(gate.passed for gate in release.gates)]
    error = GateError(f"{len(refused)} of {len(promotion.releases)} would be refused") if refused else None
    return Outcome(document=promotion.to_json(), error=error)


def show(document: Document) -> None:
    from edgeopt.cli import display

    for release in document["releases"]:
        name = f"{document['model']} version {release['version']}"
        if document["dry_run"]:
            words = f"would become {name if release['version'] else 'a new version of ' + document['model']}"
            aliases = [f"{alias} ({_before(document, alias)})" for alias in release["aliases"]]
        else:
            words = f"is {name}" + ("" if release["created"] else ", as before")
            aliases = release["aliases"]
        display.out.print(f"trial {release['number']} {words}" + "".join(f", alias {alias}" for alias in aliases))
        if document["dry_run"]:
            display.gates(release["gates"])


def _before(document: Document, alias: str) -> str:
    if alias not in document["moved"]:
        return "points there already"
    return f"now at {document['moved'][alias] or 'no version'}"
