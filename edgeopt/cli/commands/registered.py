"""The arguments that commands on registered models share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.release import signature

if TYPE_CHECKING:
    from edgeopt.release.registry.client import Reference

MODEL = "edgeopt"


def version(parser: argparse.ArgumentParser, form: str = "NAME/VERSION") -> None:
    parser.add_argument("version", metavar=form, help="a version of a registered model, by number or by alias")
    tracking(parser)


def model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=MODEL, metavar="NAME", help=f"registered model (default: {MODEL})")
    tracking(parser)


def tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow's (default: MLFLOW_TRACKING_URI, or ./mlflow.db)")


def reason(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--reason", required=required, default="", metavar="TEXT", help="why, for the ledger")


def policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", default="default", metavar="NAME", help="a file of registry/ (default: default)")


def public_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--public-key", type=Path, metavar="PEM", help="checks the signature")


def private_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        type=Path,
        metavar="PEM",
        default=signature.key_of_environment(),
        help=f"private key that signs (default: {signature.KEY})",
    )


def reference(args: argparse.Namespace) -> Reference:
    """The version that was named."""
    from edgeopt.release.registry.client import Reference

    return Reference.parse(args.version)
