"""Implement `edgeopt serve`."""

from __future__ import annotations

import argparse
import sys

from edgeopt.cli.commands import engines
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError

SUMMARY = "Serve an engine over HTTP with the OpenAI API"
EXAMPLE = "edgeopt serve edgeopt@champion"
SWITCH_INTERVAL_S = 0.0005
"""Interval of `sys.setswitchinterval`. The default of 5 ms would delay each token."""


def arguments(parser: argparse.ArgumentParser) -> None:
    engines.argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--name", default="edgeopt", help="model name in requests (default: edgeopt)")
    parser.add_argument("--queue-size", type=int, default=16, metavar="N", help="requests that may wait (default: 16)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds a request may take (default: 120)"
    )


def execute(args: argparse.Namespace) -> Outcome:
    import uvicorn

    from edgeopt.cli import display
    from edgeopt.config import assemble, trial_process
    from edgeopt.serving.app import Service
    from edgeopt.serving.request_parser import RequestParser
    from edgeopt.serving.worker import Worker
    from edgeopt.studies.engine import verified_engine

    for option, value in (("--queue-size", args.queue_size), ("--timeout", args.timeout)):
        if value <= 0:
            raise ConfigError(f"`{option}` must be positive, got {value:g}", location=option, hint="Give 1 or more")
    trial_process.silence_libraries()
    with verified_engine(args.engine) as (engine, runtime):
        parser = RequestParser(engine, args.name, context_length=engine.spec.context_length)
        session = runtime.open(engine, threads=assemble.this_machine().cores)
        worker = Worker(session, parser.tokenizer, queue_size=args.queue_size)
        display.err.print(f"serving {args.name} on http://{args.host}:{args.port}/v1, engine {engine.digest[:12]}…")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        app = Service(parser, worker, timeout_s=args.timeout).app()
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=30)
    return Outcome(document={"engine": str(engine.directory), "tokens": worker.generated_tokens})


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.out.print(f"generated {display.count(document['tokens'], 'token')}")
