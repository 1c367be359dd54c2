"""`edgeopt ui`."""

from __future__ import annotations

import argparse
import os
import sys

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Serve MLflow's UI with pages for studies, runs side by side, and releases"
EXAMPLE = "edgeopt ui --port 5000"
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Unless it is set: jobs of MLflow's judges and prompt optimizers take eight processes and 1.4 GiB."""


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.tracking(parser)
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=5000, help="(default: 5000)")


def execute(args: argparse.Namespace) -> Outcome:
    """Serve until Ctrl-C."""
    from edgeopt.tracking import server

    uri = server.absolute_uri(server.resolve_uri(args.tracking_uri))
    server.probe(uri)
    address = f"http://{args.host}:{args.port}"
    print(f"edgeopt: {address}/edgeopt/", file=sys.stderr)
    if uri.startswith(("http://", "https://")):
        _beside(uri, args.host, args.port)
    else:
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "edgeopt", "--workers", "1"]
        command += ["--host", args.host, "--port", str(args.port)]
        # in the environment, since an address may hold a password that a list of processes would show;
        # it is this process from here on, so that signals reach it
        os.execve(command[0], command, {**LEAN, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri})  # noqa: S606
    return Outcome(document={"address": address})


def _beside(uri: str, host: str, port: int) -> None:
    """The pages alone, for a server that runs elsewhere."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import RedirectResponse
    from starlette.routing import Mount, Route

    from edgeopt.core.redaction import redact_password
    from edgeopt.pages.app import PREFIX, create_pages

    home = Route("/", lambda _: RedirectResponse(f"{PREFIX}/"))
    app = Starlette(routes=[home, Mount(PREFIX, app=create_pages(uri, f"{redact_password(uri).rstrip('/')}/"))])
    uvicorn.run(app, host=host, port=port, log_level="warning")


def show(document: Document) -> None:
    """What there was to say was said before it began."""
