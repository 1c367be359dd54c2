"""Implement `edgeopt front`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.core.study_snapshot import OUTCOMES

SUMMARY = "Show the trials of a study and its Pareto front"
EXAMPLE = "edgeopt front --json"
BRIEF = True
SHOWN = 100
"""Trials in the table; the front is always shown as a whole."""
_ORDER = {"finished": 0, "stopped": 1, "refused": 2, "running": 3, "waiting": 4, "failed": 5}
_REASON_CHARACTERS = 90


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

    objectives = document["objectives"]
    trials = sorted(
        document["trials"],
        key=lambda t: (_ORDER[t["state"]], t["pareto_rank"] or 10**6, not t["feasible"], t["number"]),
    )
    waiting = [trial for trial in trials if trial["state"] == "waiting"]
    trials = [trial for trial in trials if trial["state"] != "waiting"]
    shown = trials[: max(SHOWN, len(document["front"]))]
    params = list(dict.fromkeys(name for trial in shown for name in trial["params"]))
    table = Table(
        title=f"study {document['study']}: {len(trials)} trials, {len(document['front'])} on the front",
        padding=(0, 0),
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("trial", justify="right", no_wrap=True)
    for name in params:
        table.add_column(name.rpartition(".")[2].replace("_", "\n"), no_wrap=True)
    for objective in objectives:
        table.add_column(_head(objective["metric"]), justify="right", no_wrap=True)
    table.add_column("outcome", min_width=14)
    baseline = _baseline(trials)
    if any(objective["metric"] in baseline for objective in objectives):
        values = [_value(baseline.get(objective["metric"])) for objective in objectives]
        table.add_row("–", *["" for _ in params], *values, "original model", style="italic")
    for trial in shown:
        values = [_value(trial["metrics"].get(objective["metric"])) for objective in objectives]
        style = "bold green" if trial["pareto_rank"] == 1 else "" if trial["feasible"] else "dim"
        settings = [_setting(trial["params"].get(name, "")) for name in params]
        table.add_row(str(trial["number"]), *settings, *values, _outcome(trial), style=style)
    display.out.print(table)
    if len(trials) > len(shown):
        display.out.print(f"{len(trials) - len(shown)} more trials: edgeopt front {document['study']} --json")
    if waiting:
        display.out.print(f"waiting: {display.count(len(waiting), 'trial')}")
    for trial in shown:
        if trial["failure"]:
            reason = " ".join(trial["failure"].split())[:_REASON_CHARACTERS]
            display.out.print(f"trial {trial['number']} failed at {reason}")
    for limit in document["limits"]:
        display.out.print(f"limit: {limit['metric']} {_limit(limit)}")
    if document["champion"]:
        champion = document["champion"]
        display.out.print(f"champion: {champion['name']}@champion (version {champion['version']})")


def _head(metric: str) -> str:
    """Return the last part of a metric's name, with its unit on a line of its own."""
    name, _, unit = metric.rpartition("/")[2].rpartition("_")
    return f"{name.replace('_', ' ')}\n{unit}" if name else unit


def _value(value: float | None) -> str:
    """Return a value with three significant digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _setting(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _baseline(trials: list[Document]) -> Document:
    """Return the values of the original model on which all trials agree."""
    values: dict[str, set[float]] = {}
    for trial in trials:
        for metric, value in trial["baseline"].items():
            values.setdefault(metric, set()).add(value)
    return {metric: found.pop() for metric, found in values.items() if len(found) == 1}


def _outcome(trial: Document) -> str:
    """Return the outcome, with the first limit that the trial does not satisfy."""
    outcome = str(trial["outcome"])
    if trial["feasible"] or trial["failure"]:
        return outcome
    excesses = trial["excess"].items()
    exceeded = [metric for metric, excess in excesses if excess is not None and excess > 0]
    unmeasured = [] if trial["refused"] else [metric for metric, excess in excesses if excess is None]
    if exceeded or unmeasured:
        return f"{outcome}: {[*exceeded, *unmeasured][0].rpartition('/')[2]}"
    return f"{outcome}: disturbed" if outcome == OUTCOMES["infeasible"] else outcome


def _limit(limit: Document) -> str:
    from edgeopt.core import units

    if limit["bound"] is None or "baseline" not in limit["limit"]:
        return str(limit["limit"])
    return f"{limit['limit']} = {units.format_quantity(limit['bound'], limit['unit'])}"
