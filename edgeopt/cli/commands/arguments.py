"""Declare the arguments that several commands share, and read them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request


def overrides(parser: argparse.ArgumentParser) -> None:
    """Add Hydra overrides."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def cfg(parser: argparse.ArgumentParser) -> None:
    """Add --cfg."""
    parser.add_argument("--cfg", action="store_true", help="print the composed config and do nothing else")


def study(parser: argparse.ArgumentParser, *, option: bool = False) -> None:
    """Add the study, as an argument or as the option --study, with the places where studies are stored."""
    words = "name of the study (default: the latest)"
    if option:
        parser.add_argument("--study", metavar="NAME", help=words)
    else:
        parser.add_argument("study", nargs="?", help=words)
    parser.add_argument("--state", type=Path, default=Path(".edgeopt"), help="state folder (default: .edgeopt)")
    parser.add_argument(
        "--store", metavar="URL", help="store of studies (default: EDGEOPT_STORE, or a file in --state)"
    )


def request(args: argparse.Namespace, name: str = "config") -> Request:
    """Return the config that the arguments ask for. Raises ConfigError for an argument that is not an override."""
    from edgeopt.config.assemble import Request

    for item in args.overrides:
        if "=" not in item and not item.startswith("~"):
            raise ConfigError(
                f"an override must have the form key=value, got {item!r}",
                location="arguments",
                hint="Give key=value, or ~key to remove a key",
            )
    return Request(name=name, overrides=tuple(args.overrides), config_dir=args.config_dir)
