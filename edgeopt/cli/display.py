"""Print results on stdout, and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from edgeopt.core import units
from edgeopt.studies import terminal

Document = Mapping[str, Any]

err = terminal.err
out = terminal.console(sys.stdout, stderr=False)
progress = terminal.step
REPORTER = terminal.TerminalReporter()


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun in the right form, such as `1 trial` or `3 trials`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def status(document: Document) -> None:
    """Print the document of `edgeopt status`."""
    trials = ", ".join(f"{number} {outcome}" for outcome, number in document["outcomes"].items()) or "none yet"
    out.print(f"study {document['study']}: {f'ended, {reason}' if (reason := document['stop_reason']) else 'running'}")
    out.print(f"trials: {trials}; budget {document['budget']}")
    out.print(f"lost attempts: {document['lost_attempts']}")
    if document["unrecorded"]:
        out.print(f"not in MLflow yet: {count(document['unrecorded'], 'trial')}")
    out.print(f"feasible: {document['feasible']}, on the front: {document['front']}")
    for title, key in (("stopped early or refused at", "rungs"), ("exceeded limits", "exceeded_limits")):
        if document[key]:
            out.print(f"{title}: " + ", ".join(f"{name} {number}" for name, number in document[key].items()))
    saved = document["saved_s"]
    minutes = {name: f"{seconds / 60:.1f}" for name, seconds in saved.items()}
    out.print(f"time spent: {document['spent_s'] / 60:.1f} min")
    out.print(
        f"time saved: {minutes['prediction']} min by prediction, {minutes['rungs']} min by early stopping, "
        f"{minutes['cache']} min by caching"
    )
    if document["spent_j"]:
        out.print(f"energy: {document['spent_j'] / 3600:.3g} Wh (estimated without a power sensor)")
    out.print(f"hypervolume: {document['hypervolume']:.4f} {_sparkline(document['hypervolumes'])}")
    if document["remaining_s"] is not None:
        out.print(f"remaining: about {document['remaining_s'] / 60:.0f} min")
    for worker in document["workers"]:
        doing = "idle" if worker["trial"] is None else f"trial {worker['trial']}"
        out.print(f"worker {worker['worker']} ({worker['role']}): {doing}")


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return values as a line of bars, at most `width` of them."""
    bars = "▁▂▃▄▅▆▇█"
    shown = values[:: max(1, -(-len(values) // width))]
    top = max(shown, default=0.0) or 1.0
    return "".join(bars[min(len(bars) - 1, int(len(bars) * value / top))] for value in shown)


def config(document: Document) -> bool:
    """Print the document if it is a composed config; return False if it is not."""
    if set(document) != {"config"}:
        return False
    import yaml

    print(yaml.safe_dump(document["config"], sort_keys=False, allow_unicode=True), end="")
    return True


def measurements(found: list[Document]) -> None:
    """Print a table of measurements with their intervals and methods."""
    if not found:
        return
    table = Table()
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("method", overflow="fold")
    for m in found:
        interval = "" if m["low"] == m["high"] else f"{m['low']:.3g} … {m['high']:.3g}"
        marks = ("" if m["kind"] == "measured" else f"{m['kind']}: ") + ("disturbed: " if m["noisy"] else "")
        table.add_row(
            m["metric"], units.format_quantity(m["value"], m["unit"]), interval, str(m["count"]), marks + m["method"]
        )
    out.print(table)


def verdicts(found: list[Document]) -> None:
    """Print one line per limit."""
    for verdict in found:
        words = ("satisfied", "green") if verdict["satisfied"] else (f"not satisfied: {verdict['reason']}", "red")
        if verdict["satisfied"] and verdict["predicted"]:
            words = ("not measured, but the prediction does not exceed it", "yellow")
        out.print(Text.assemble(f"{verdict['metric']} {verdict['limit']}: ", words))


def gates(found: list[Document]) -> None:
    """Print one line per gate or check."""
    for verdict in found:
        out.print(
            Text.assemble(
                ("  passed  " if verdict["passed"] else "  FAILED  ", "green" if verdict["passed"] else "red"),
                f"{verdict['gate']}: {verdict['evidence']}",
            )
        )
