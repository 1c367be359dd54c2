"""Implement `edgeopt sweep`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands import front, promote
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Search recipes under hard limits and promote the best"
EXAMPLE = "edgeopt sweep --config-name reference workers=2"
KEYS = ("model", "target", "limits.METRIC", "search.study", "search.trials", "search.objectives", "workers", "promote")


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    shared.cfg(parser)
    parser.add_argument(
        "--config-name", "-n", default="reference", metavar="NAME", help="sweep file in sweeps/ (default: reference)"
    )


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display

    request = shared.request(args, name=args.config_name)
    if args.cfg:
        return Outcome(document={"config": request.compose()})

    from edgeopt.studies.open_study import nothing_feasible
    from edgeopt.studies.sweep import run_sweep

    result = run_sweep(request, display.REPORTER)
    error = None if result.snapshot.front else nothing_feasible(result.snapshot)
    return Outcome(document=result.to_json(), error=error)


def show(document: Document) -> None:
    from edgeopt.cli import display

    if display.config(document):
        return
    front.show(document)
    if "promotion" in document:
        promote.show(document["promotion"])
    links = document["mlflow"]
    if links["command"]:
        display.out.print(f"view the results: {links['command']}")
    pages = {"study": links["page_url"], "MLflow": links["url"], **links["view_urls"]}
    for name, url in pages.items():
        if url:
            display.out.print(f"{name:>10}  {url}")
