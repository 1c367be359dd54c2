"""Implement `edgeopt generate`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import engines
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Complete a prompt"
EXAMPLE = "edgeopt generate --prompt 'def read('"


def arguments(parser: argparse.ArgumentParser) -> None:
    engines.argument(parser)
    parser.add_argument("--prompt", default="def read_lines(path):", help="text to complete")
    parser.add_argument("--adapter", metavar="NAME", help="one of the engine's adapters (default: none)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.config import trial_process
    from edgeopt.studies.engine import LoadedEngine

    trial_process.silence_libraries()
    with LoadedEngine(args.engine) as engine:
        tokens = list(engine.tokens(args.prompt, max_new_tokens=args.max_new_tokens, adapter=args.adapter))
        text = engine.decode(tokens)
    return Outcome(document={"prompt": args.prompt, "completion": text, "tokens": len(tokens)})


def show(document: Document) -> None:
    print(document["prompt"] + document["completion"])
