"""`edgeopt generate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edgeopt.cli.commands import engines
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError, InputError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.core.protocols import Runtime

SUMMARY = "Complete a prompt"
EXAMPLE = "edgeopt generate --prompt 'def read('"


def arguments(parser: argparse.ArgumentParser) -> None:
    engines.argument(parser)
    parser.add_argument("--prompt", default="def read_lines(path):", help="text to complete")
    parser.add_argument("--adapter", metavar="NAME", help="one of the engine's adapters (default: none)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.config import assemble

    if args.max_new_tokens < 1:
        raise ConfigError(
            f"{args.max_new_tokens} tokens cannot be generated", location="--max-new-tokens", hint="Give 1 or more"
        )
    assemble.quiet()
    with engines.opened(args.engine) as (engine, runtime):
        return _completed(args, engine, runtime)


def _completed(args: argparse.Namespace, engine: Engine, runtime: Runtime) -> Outcome:
    from edgeopt.checkpoints import adapters
    from edgeopt.checkpoints import tokenizer as tokens
    from edgeopt.config import assemble

    adapters.require(args.adapter, engine.spec, location="--adapter")
    tokenizer = tokens.load(engine.directory)
    prompt = tokens.prefix(engine.directory) + tokenizer.encode(args.prompt, add_special_tokens=False).ids
    room = engine.spec.context_length - len(prompt)
    if room < 1:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the context holds {engine.spec.context_length}",
            location="--prompt",
            hint="Give a shorter prompt",
        )
    session = runtime.open(engine, threads=assemble.this_machine().cores)
    new = list(session.generate(prompt, min(args.max_new_tokens, room), adapter=args.adapter))
    session.close()
    return Outcome(document={"prompt": args.prompt, "completion": tokenizer.decode(new), "tokens": len(new)})


def show(document: Document) -> None:
    print(document["prompt"] + document["completion"])
