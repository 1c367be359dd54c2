"""The arguments that several commands share, and what is read from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request


def overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def cfg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", action="store_true", help="print the composed config and do nothing else")


def study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", nargs="?", help="the latest one by default")
    parser.add_argument("--state", type=Path, default=Path(".edgeopt"), help="folder of the cache (default: .edgeopt)")
    parser.add_argument(
        "--store", metavar="URL", help="store of studies (default: EDGEOPT_STORE, or a file in --state)"
    )


def request(args: argparse.Namespace, name: str = "config") -> Request:
    """What `args` ask to compose."""
    from edgeopt.config.assemble import Request

    for item in args.overrides:
        if "=" not in item and not item.startswith("~"):
            raise ConfigError(f"{item!r} is no override", location="arguments", hint="Give key=value")
    return Request(name=name, overrides=tuple(args.overrides), config_dir=args.config_dir)
