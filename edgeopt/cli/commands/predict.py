"""Implement `edgeopt predict`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import InfeasibleError

SUMMARY = "Predict size, memory and speed of a recipe by arithmetic"
EXAMPLE = "edgeopt predict recipe=int4 target=sbc_4gib"
KEYS = ("model", "recipe", "runtime", "target", "step.NAME.FIELD", "limits.METRIC")


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    parser.add_argument(
        "--config-name", "-n", default="config", metavar="NAME", help="sweep file that provides model, texts and limits"
    )


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.studies.recipe_prediction import predict_recipe

    prediction = predict_recipe(shared.request(args, name=args.config_name))
    if prediction.fits:
        return Outcome(document=prediction.to_json())
    metric = next(check.limit.metric for check in prediction.limits if not check.fits)
    error = InfeasibleError(
        f"{metric} is predicted beyond its limit, even at the best end of the prediction", hint=prediction.next_step
    )
    return Outcome(document=prediction.to_json(), error=error)


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display
    from edgeopt.core import units

    title = f"{document['recipe']} on {document['target']} ({document['method']})"
    if document["breakdown"]:
        table = Table(title=title)
        table.add_column("component")
        table.add_column("MiB", justify="right")
        for name, value in document["breakdown"].items():
            table.add_row(name.replace("_bytes", "").replace("_", " "), f"{value / 2**20:.2f}")
        display.out.print(table)
    else:
        display.out.print(title)
    display.out.print(f"{document['parameters']:,} parameters, size class {document['tier']}")
    for metric, prediction in document["predictions"].items():
        value, low, high = (
            units.format_quantity(prediction[name], prediction["unit"]) for name in ("value", "low", "high")
        )
        display.out.print(f"{metric} {value}, between {low} and {high}")
    for check in document["limits"]:
        verdict = "fits" if check["fits"] else "does not fit"
        predicted = units.format_quantity(check["predicted"], check["unit"])
        display.out.print(f"{check['metric']} {predicted}, {check['limit']}: {verdict}")
    display.out.print(f"next step: {document['next_step']}")
