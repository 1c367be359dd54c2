"""Implement `edgeopt compare`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Compare two to four trials of a study: parameters, metrics and intervals"
EXAMPLE = "edgeopt compare 5 8"
BRIEF = True


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trials", type=int, nargs="+", metavar="TRIAL", help="numbers of the trials; the first is the reference"
    )
    shared.study(parser, option=True)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.core.study_summary import MAX_COMPARED, MIN_COMPARED
    from edgeopt.errors import ConfigError, InputError
    from edgeopt.studies.open_study import OpenStudy

    numbers = list(dict.fromkeys(args.trials))
    if not MIN_COMPARED <= len(numbers) <= MAX_COMPARED:
        raise ConfigError(
            f"`TRIAL` must name {MIN_COMPARED} to {MAX_COMPARED} different trials, got {len(numbers)}", location="TRIAL"
        )
    opened = OpenStudy.find(args.study, args.state, args.store)
    snapshot = opened.snapshot()
    known = {trial.number: trial for trial in snapshot.trials}
    missing = [str(number) for number in numbers if number not in known]
    if missing:
        raise InputError(
            f"study {snapshot.study!r} has no trial {', '.join(missing)}",
            location="TRIAL",
            hint=f"See edgeopt front {snapshot.study}",
        )
    chosen = [known[number] for number in numbers]
    return Outcome(
        document={
            "study": snapshot.study,
            "units": {name: opened.metrics.get(name, "") for trial in chosen for name in trial.metrics},
            "trials": [trial.to_json() for trial in chosen],
        }
    )


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display

    trials = document["trials"]
    first = trials[0]
    table = Table(title=f"study {document['study']}")
    table.add_column("")
    for trial in trials:
        table.add_column(f"trial {trial['number']}", justify="right")
    table.add_row("outcome", *(trial["outcome"] for trial in trials))
    for name in dict.fromkeys(name for trial in trials for name in trial["params"]):
        values = [str(trial["params"].get(name, "–")) for trial in trials]
        if len(set(values)) > 1:
            table.add_row(name, *values)
    table.add_section()
    for name in dict.fromkeys(name for trial in trials for name in trial["metrics"]):
        cells = [_cell(trial, first, name, document["units"][name]) for trial in trials]
        table.add_row(name, *cells)
    display.out.print(table)
    display.out.print(
        "× is the ratio to the first trial; * marks intervals that do not overlap with the first trial's."
    )


def _cell(trial: Document, first: Document, name: str, unit: str) -> str:
    from edgeopt.core import units

    value, base = trial["metrics"].get(name), first["metrics"].get(name)
    if value is None:
        return "–"
    text = units.format_quantity(value, unit)
    if trial is first or not base:
        return text
    low, high = trial["intervals"].get(name, (value, value))
    first_low, first_high = first["intervals"].get(name, (base, base))
    mark = "*" if low > first_high or high < first_low else ""
    return f"{text} ({value / base:.2f}×){mark}"
