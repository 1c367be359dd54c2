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


def status(document: Document) -> None:
    """`edgeopt status` for people."""
    trials = ", ".join(f"{count} {outcome}" for outcome, count in document["outcomes"].items()) or "none yet"
    out.print(f"study {document['study']}: {document['over'] or 'goes on'}")
    out.print(f"trials: {trials}; budget {document['budget']}; {document['attempts_lost']} attempts were lost")
    if document["unrecorded"]:
        out.print(f"{document['unrecorded']} are over and not in MLflow yet")
    out.print(f"{document['feasible']} keep every limit, {document['front']} on the front")
    for title, key in (("stopped at", "rungs"), ("broken limits", "broken_limits")):
        if document[key]:
            out.print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in document[key].items()))
    saved = ", ".join(f"{by} {seconds / 60:.1f}" for by, seconds in document["saved_s"].items())
    out.print(f"spent: {document['spent_s'] / 60:.1f} min; saved, in min: {saved}")
    if document["spent_j"]:
        out.print(f"energy: {document['spent_j'] / 3600:.3g} Wh")
    out.print(f"hypervolume: {document['hypervolume']:.4f} {_sparkline(document['hypervolumes'])}")
    if document["left_s"] is not None:
        out.print(f"estimated to take {document['left_s'] / 60:.0f} min more")
    for worker in document["workers"]:
        doing = "idle" if worker["trial"] is None else f"trial {worker['trial']}"
        out.print(f"worker {worker['worker']} ({worker['role']}): {doing}")


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a row of bars, at most `width` of them."""
    bars = "▁▂▃▄▅▆▇█"
    shown = values[:: max(1, -(-len(values) // width))]
    top = max(shown, default=0.0) or 1.0
    return "".join(bars[min(len(bars) - 1, int(len(bars) * value / top))] for value in shown)


def config(document: Document) -> bool:
    """Print a composed config, where that is all that was asked for."""
    if set(document) != {"config"}:
        return False
    import yaml

    print(yaml.safe_dump(document["config"], sort_keys=False, allow_unicode=True), end="")
    return True


def measurements(found: list[Document]) -> None:
    if not found:
        return
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("n", justify="right")
    table.add_column("method", overflow="fold")
    for m in found:
        interval = "" if m["low"] == m["high"] else f"{m['low']:.4g} … {m['high']:.4g}"
        marks = ("" if m["kind"] == "measured" else "estimated: ") + ("noisy: " if m["noisy"] else "")
        table.add_row(
            m["metric"], units.format_quantity(m["value"], m["unit"]), interval, str(m["count"]), marks + m["method"]
        )
    out.print(table)


def verdicts(found: list[Document]) -> None:
    for v in found:
        told = ("kept", "green") if v["kept"] else (f"not kept: {v['reason']}", "red")
        if v["kept"] and v["predicted"]:
            told = ("not measured, and not excluded by what was predicted", "yellow")
        out.print(Text.assemble(f"{v['metric']} {v['limit']}: ", told))


def gates(found: list[Document]) -> None:
    """What gates or checks said, a line each."""
    for verdict in found:
        out.print(
            Text.assemble(
                ("  passed  " if verdict["passed"] else "  REFUSED ", "green" if verdict["passed"] else "red"),
                f"{verdict['gate']}: {verdict['evidence']}",
            )
        )
