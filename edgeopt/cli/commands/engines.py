"""Declare the engine argument that several commands share."""

from __future__ import annotations

import argparse


def argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine",
        nargs="?",
        metavar="ENGINE",
        help="engine folder or models:/NAME@ALIAS (default: the bundled model in PyTorch)",
    )
