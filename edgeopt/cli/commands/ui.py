"""Implement `edgeopt ui`."""

from __future__ import annotations

import argparse
import os
import sys

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Serve the MLflow UI with pages for studies, comparisons and releases"
EXAMPLE = "edgeopt ui --port 5000"
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Defaults for the server: MLflow's job runners would take eight processes and 1.4 GiB."""


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.tracking(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, only this machine)"
    )
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default: 5000)")


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
        # The URI goes into the environment: it may hold a password, which the process list would show. The server
        # replaces this process, so that signals reach it.
        os.execve(command[0], command, {**LEAN, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri})  # noqa: S606
    return Outcome(document={"address": address})


def _beside(uri: str, host: str, port: int) -> None:
    """Serve only the pages, for an MLflow server that runs elsewhere."""
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
    """Print nothing: the address was printed before the server started."""
