"""`edgeopt promote`."""

from __future__ import annotations

import argparse

from edgeopt.commands import arguments as shared
from edgeopt.commands.outcome import Document, Outcome

SUMMARY = "Register the front's members by a policy"
EXAMPLE = "edgeopt promote reference"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)
    parser.add_argument("--policy", default="default", metavar="NAME", help="a file of registry/ (default: default)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.commands.studies import OpenStudy

    study = OpenStudy.find(args.study, args.state, args.store)
    policy = study.policy(args.policy, args.config_dir)
    study.recorder.connect()
    return Outcome(document=study.promote(study.front(), policy, args.config_dir))


def show(document: Document) -> None:
    from edgeopt import display

    for release in document["releases"]:
        names = [alias for alias, version in document["aliases"].items() if version == release["version"]]
        told = "registered" if release["created"] else "was registered before"
        also = f", alias {', '.join(names)}" if names else ""
        display.out.print(f"{document['model']} version {release['version']}: trial {release['number']} {told}{also}")
