"""Implement `edgeopt run`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Evaluate one recipe and log it"
EXAMPLE = "edgeopt run recipe=prune_lora_int4 step.prune.ratio=0.2"
KEYS = ("model", "recipe", "runtime", "target", "step.NAME.FIELD", "limits.METRIC", "measure", "calibration")


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    shared.cfg(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.studies.single_run import evaluate_recipe

    request = shared.request(args)
    if args.cfg:
        return Outcome(document={"config": request.compose()})
    result = evaluate_recipe(request, display.REPORTER)
    return Outcome(document=result.to_json(), error=result.error)


def show(document: Document) -> None:
    from edgeopt.cli import display

    if display.config(document):
        return
    display.measurements(document["measurements"])
    display.verdicts(document["verdicts"])
    for note in document["notes"]:
        display.out.print(f"note: {note}")
    if document["engine"]:
        display.out.print(f"engine: {document['engine']['directory']}")
    display.out.print(f"MLflow run: {document['run_id']}")
