"""`edgeopt profile`."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from pathlib import Path

from edgeopt.commands.outcome import Document, Outcome
from edgeopt.errors import InputError

SUMMARY = "Measure this machine and write it as a target"
EXAMPLE = "edgeopt profile --out my/target/box.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="name of the target (default: the host's name)")
    parser.add_argument("--out", type=Path, help="file to write (default: stdout)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt import display
    from edgeopt.measure.inventory import inventory, target_yaml

    with display.progress("measuring this machine"):
        device = inventory(rates=True)
    name = args.name or platform.node().split(".")[0] or "this_machine"
    written = target_yaml(device, name=name, threads=0, context_length=512)
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(written)
        except OSError as error:
            raise InputError(
                f"the file cannot be written ({error.strerror})", place=str(args.out), mend="Give another --out"
            ) from error
    return Outcome(
        document={
            "device": asdict(device),
            "name": name,
            "written": None if args.out is None else str(args.out),
            "yaml": written,
        }
    )


def show(document: Document) -> None:
    from edgeopt import display

    if document["written"]:
        display.out.print(f"written: {document['written']}; use it by target={document['name']}")
    else:
        print(document["yaml"], end="")
