"""Declare the engine argument that several commands share."""

from __future__ import annotations

import argparse


def argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine",
        nargs="?",
        metavar="ENGINE",
        help="engine folder, NAME@ALIAS or models:/NAME/VERSION (default: the bundled model in PyTorch)",
    )
