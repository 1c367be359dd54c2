"""Implement `edgeopt audit`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError, GateError

SUMMARY = "Compare a registered model with its ledger"
EXAMPLE = "edgeopt audit edgeopt"
BRIEF = True


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.model(parser)
    parser.add_argument("--adopt", action="store_true", help="accept aliases and versions as they are; needs --reason")
    registered.reason(parser, required=False)


def execute(args: argparse.Namespace) -> Outcome:
    if args.adopt:
        if not args.reason:
            raise ConfigError("--adopt needs a reason", location="--reason", hint='Give --reason "…"')
        from edgeopt.release.adopt import adopt

        report = adopt(args.model, args.reason, tracking_uri=args.tracking_uri)
    else:
        from edgeopt.release.audit import audit
        from edgeopt.release.registry import fast_reader

        report = audit(args.model, tracking_uri=args.tracking_uri)
        if not report.entries and not report.problems:
            raise fast_reader.unregistered_model_error(args.model)
    error = GateError("; ".join(report.problems), location=f"ledger of {args.model}") if report.problems else None
    return Outcome(document=report.to_json(), error=error)


def show(document: Document) -> None:
    from edgeopt.cli import display

    entries = display.count(len(document["entries"]), "entry", "entries")
    display.out.print(f"{document['model']}: {entries}, {display.count(len(document['faults']), 'fault')}")
    for fault in document["faults"]:
        display.out.print(f"- {fault}")
    if document["open"]:
        display.out.print(f"still open: {document['open']}")
