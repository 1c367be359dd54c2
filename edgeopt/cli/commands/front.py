"""`edgeopt front`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.core.recipe import label

SUMMARY = "Show a study's trials and its Pareto front"
EXAMPLE = "edgeopt front --json"
BRIEF = True
SHOWN = 100
"""Trials in the table, and as many as the front has where those are more."""


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.studies.open_study import OpenStudy

    study = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER)
    return Outcome(document=study.snapshot_with_champion().to_json())


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display
    from edgeopt.core import units

    names = [o["metric"] for o in document["objectives"]]
    unit_of = {o["metric"]: o["unit"] for o in document["objectives"]}
    table = Table(
        title=f"study {document['study']}: {len(document['trials'])} trials, front of {len(document['front'])}"
    )
    table.add_column("trial", justify="right")
    table.add_column("recipe", overflow="fold")
    for name in names:
        table.add_column(name.replace("/", "/\n"), justify="right")
    table.add_column("limits")
    ordered = sorted(document["trials"], key=lambda t: (t["pareto_rank"] or 10**6, t["number"]))
    shown = max(SHOWN, len(document["front"]))
    for trial in ordered[:shown]:
        figures = [units.show(trial["metrics"][n], unit_of[n]) if n in trial["metrics"] else "–" for n in names]
        style = "bold green" if trial["pareto_rank"] == 1 else "" if trial["feasible"] else "dim"
        table.add_row(str(trial["number"]), label(trial["params"]), *figures, _state(trial), style=style)
    display.out.print(table)
    if len(ordered) > shown:
        display.out.print(f"and {len(ordered) - shown} more: edgeopt front {document['study']} --json")
    for limit in document["limits"]:
        display.out.print(f"limit: {limit['metric']} {limit['limit']}")
    if document["champion"]:
        champion = document["champion"]
        display.out.print(f"champion: models:/{champion['name']}@champion (version {champion['version']})")


def _state(trial: Document) -> str:
    if trial["failure"]:
        return f"failed: {trial['failure']}"[:80]
    if trial["feasible"]:
        return "kept"
    broken = [metric for metric, excess in trial["excess"].items() if excess is None or excess > 0]
    if trial["refused"]:
        certain = [metric for metric, excess in trial["excess"].items() if excess is not None and excess > 0]
        word = "refused" if trial["state"] == "refused" else "stopped"
        return f"{word} by {trial['refused']}: {', '.join(certain)}"
    if broken:
        return f"breaks {', '.join(broken)}"
    return "not proven: disturbed" if trial["state"] == "finished" else trial["state"]
