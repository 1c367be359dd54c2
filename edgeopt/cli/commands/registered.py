"""Declare the arguments of commands on registered models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.release import signature

if TYPE_CHECKING:
    from edgeopt.release.registry.client import Reference

MODEL = "edgeopt"


def version(parser: argparse.ArgumentParser, form: str = "NAME@ALIAS") -> None:
    """Add a version of a registered model, and the tracking URI."""
    parser.add_argument(
        "version",
        metavar=form,
        help="a version of a registered model: NAME@ALIAS or NAME/VERSION, with or without models:/",
    )
    tracking(parser)


def model(parser: argparse.ArgumentParser) -> None:
    """Add the name of a registered model, and the tracking URI."""
    parser.add_argument("model", nargs="?", default=MODEL, metavar="NAME", help=f"registered model (default: {MODEL})")
    tracking(parser)


def tracking(parser: argparse.ArgumentParser) -> None:
    """Add the tracking URI."""
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow tracking URI (default: MLFLOW_TRACKING_URI, or ./mlflow.db)"
    )


def reason(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the reason of a release operation."""
    parser.add_argument("--reason", required=required, default="", metavar="TEXT", help="reason for the ledger")


def policy(parser: argparse.ArgumentParser) -> None:
    """Add the release policy."""
    parser.add_argument(
        "--policy", default="default", metavar="NAME", help="release policy in registry/ (default: default)"
    )


def public_key(parser: argparse.ArgumentParser) -> None:
    """Add the key that checks a signature."""
    parser.add_argument("--public-key", type=Path, metavar="PEM", help="public key that checks the signature")


def private_key(parser: argparse.ArgumentParser) -> None:
    """Add the key that signs."""
    parser.add_argument(
        "--key",
        type=Path,
        metavar="PEM",
        default=signature.key_from_environment(),
        help=f"private key that signs (default: {signature.KEY})",
    )


def reference(args: argparse.Namespace) -> Reference:
    """Return the version that the arguments name."""
    from edgeopt.release.registry.client import Reference

    return Reference.parse(args.version)
