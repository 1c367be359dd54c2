"""`edgeopt profile`."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.core.config_objects import to_config
from edgeopt.errors import ConfigError, InputError

SUMMARY = "Measure this machine and write it as a target"
EXAMPLE = "edgeopt profile --out my/target/box.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="name of the target (default: the host's name)")
    parser.add_argument("--threads", type=int, default=0, help="that engines compute with (default: one for each core)")
    parser.add_argument("--out", type=Path, help="file to write (default: stdout)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.core.target import Target
    from edgeopt.machine.inventory import detect_device, target_yaml
    from edgeopt.studies import kernel_profile

    assemble.quiet()
    name = args.name or platform.node().split(".")[0] or "this_machine"
    with display.progress("measuring this machine") as progress:
        device = detect_device(measure_rates=True)
        if not 0 <= args.threads <= device.cores:
            raise ConfigError(
                f"{args.threads} threads cannot run on {device.cores} cores", location="--threads", hint="Give fewer"
            )
        kernels = kernel_profile.kernels(device, progress, threads=args.threads)
        target = Target(name=name, device=device, threads=args.threads, kernels=kernels)
    written = target_yaml(target)
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(written)
        except OSError as error:
            raise InputError(
                f"the file cannot be written ({error.strerror})", location=str(args.out), hint="Give another --out"
            ) from error
    return Outcome(
        document={
            "device": to_config(device),
            "kernels": to_config(target.kernels),
            "name": name,
            "written": None if args.out is None else str(args.out),
            "yaml": written,
        }
    )


def show(document: Document) -> None:
    from edgeopt.cli import display

    if document["written"]:
        display.out.print(f"written: {document['written']}; use it by target={document['name']}")
    else:
        print(document["yaml"], end="")
