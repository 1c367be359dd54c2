"""Implement `edgeopt profile`."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.core.config_objects import to_config
from edgeopt.errors import InputError

SUMMARY = "Measure this machine and write it as a target"
EXAMPLE = "edgeopt profile --out my/target/box.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="name of the target (default: the host name)")
    parser.add_argument("--threads", type=int, default=0, help="compute threads of engines (default: one per core)")
    parser.add_argument("--out", type=Path, help="file to write (default: stdout)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.machine.inventory import target_yaml
    from edgeopt.studies.device_profile import profile_machine

    with display.progress("measuring this machine") as progress:
        target = profile_machine(args.name, threads=args.threads, progress=progress)
    text = target_yaml(target)
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text)
        except OSError as error:
            raise InputError(
                f"the file cannot be written ({error.strerror})",
                location=str(args.out),
                hint="Give a writable file with --out",
            ) from error
    return Outcome(
        document={
            "device": to_config(target.device),
            "kernels": to_config(target.kernels),
            "name": target.name,
            "written": None if args.out is None else str(args.out),
            "yaml": text,
        }
    )


def show(document: Document) -> None:
    from edgeopt.cli import display

    if document["written"]:
        display.out.print(f"wrote {document['written']}: use it with target={document['name']}")
    else:
        print(document["yaml"], end="")
